//! A program with a copy of the SDK beside it, which is a package that pip installs.

use super::{File, Plan, Whole};

const SDK: &[Whole] = sdk!["python/":
    "fleecebox_guest/__init__.py",
    "fleecebox_guest/archive.py",
    "fleecebox_guest/bindings.py",
    "fleecebox_guest/build.py",
    "fleecebox_guest/component/__init__.py",
    "fleecebox_guest/component/blind_entry.py",
    "fleecebox_guest/component/provider_entry.py",
    "fleecebox_guest/component/restore.py",
    "fleecebox_guest/context.py",
    "fleecebox_guest/error.py",
    "fleecebox_guest/exports.py",
    "fleecebox_guest/extent.py",
    "fleecebox_guest/mock/__init__.py",
    "fleecebox_guest/mock/host.py",
    "fleecebox_guest/objects.py",
    "fleecebox_guest/provider.py",
    "fleecebox_guest/provider.wit",
    "fleecebox_guest/py.typed",
    "fleecebox_guest/volume.py",
    "pyproject.toml",
];

pub(super) fn project(plan: &Plan) -> Vec<File> {
    let source = plan.either(
        template!("python/sighted.py.in"),
        template!("python/blind.py.in"),
    );
    let test = plan.either(
        template!("python/test_sighted.py.in"),
        template!("python/test_blind.py.in"),
    );
    let mut files = vec![
        plan.filled("main.py", source),
        plan.filled("test_main.py", test),
        plan.filled("README.md", template!("python/README.md.in")),
        plan.filled(".gitignore", template!("python/gitignore.in")),
    ];
    files.extend(SDK.iter().copied().map(File::copy));
    files
}
