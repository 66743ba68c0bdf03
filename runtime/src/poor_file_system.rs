//! For tests: what exFAT, FUSE, 9p and NFS answer where they cannot do what other file systems do.

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Does `work` on a thread that has no hard links, no rename that replaces nothing, and no files without a name.
pub(crate) fn on_one(work: impl FnOnce() + Send) {
    let flag = |argument, mask: i32| {
        let operation = SeccompCmpOp::MaskedEq(mask as u64);
        let length = SeccompCmpArgLen::Dword;
        SeccompCondition::new(argument, length, operation, mask as u64)
    };
    let refusals = [
        (libc::SYS_linkat, vec![], libc::EPERM),
        (
            libc::SYS_renameat2,
            vec![flag(4, libc::RENAME_NOREPLACE as i32)],
            libc::EINVAL,
        ),
        (
            libc::SYS_openat,
            vec![flag(2, libc::O_TMPFILE)],
            libc::EOPNOTSUPP,
        ),
    ];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (call, conditions, error) in refusals {
                let conditions: Result<Vec<_>, _> = conditions.into_iter().collect();
                let conditions = conditions.unwrap();
                let rules = match conditions.is_empty() {
                    true => vec![],
                    false => vec![SeccompRule::new(conditions).unwrap()],
                };
                let filter = SeccompFilter::new(
                    [(call, rules)].into(),
                    SeccompAction::Allow,
                    SeccompAction::Errno(error as u32),
                    TargetArch::try_from(std::env::consts::ARCH).unwrap(),
                );
                let program = BpfProgram::try_from(filter.unwrap()).unwrap();
                seccompiler::apply_filter(&program).unwrap();
            }
            work();
        });
    });
}
