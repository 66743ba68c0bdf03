//! A simulated VM, a real archive in a temporary folder, and backups from one to the other through the code of a job.

use super::diagnosis::{self, Mistake};
use super::trace::{Conversation, Cut, Fault, Trace};
use super::{KitError, Subject};
use crate::archive::{
    Archive, BackupId, BackupWriter, DiskRecord, Manifest, Moment, Namespace, NamespaceName,
};
use crate::config::{Config, Limits, Provider};
use crate::contract::with_causes;
use crate::event::Events;
use crate::extent::Extent;
use crate::grants::account::Account;
use crate::grants::farewell::Farewells;
use crate::grants::image::{Image, ImageError, Purpose};
use crate::grants::run::RunError;
use crate::job::backup::BackupError;
use crate::job::base::{Base, Recorded};
use crate::job::claims::{self, segment_of};
use crate::job::means::{Maker, Means};
use crate::job::prove::{ProofError, Proving};
use crate::job::read_back::{self, ReadBack};
use crate::job::reading::Reading;
use crate::job::recover;
use crate::job::transfer::Transfer;
use crate::job::volume_run::{Covered, Uncovered, VolumeError};
use crate::sandbox::Program;
use crate::simulator::{Disk, Export, Server, Switch};
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;
use time::OffsetDateTime;

/// The VM's name in everything that is made here.
const VM: &str = "simulated";

/// A VM and an archive.
pub(super) struct Stand<'a> {
    subject: &'a Subject,
    /// What the VM's disks hold now.
    pub(super) disks: Vec<Disk>,
    namespace: Arc<Namespace>,
    name: NamespaceName,
    folder: TempDir,
}

/// What one disk's next backup builds on, and what becomes of its bitmaps. Each is named by the backup that it started
/// with.
struct Choice {
    switch: Switch,
    base: Option<Base>,
    /// Why there is none, where there was a bitmap.
    reason: Option<String>,
    /// A bitmap that nothing can be built on any more.
    stale: Option<String>,
}

impl Choice {
    fn uncovered(&self, export: &Export, socket: &Path) -> Uncovered {
        Uncovered {
            source: export.source(socket),
            base: self.base.clone(),
            reason: self.reason.clone(),
            disk: DiskRecord {
                format: "memory".into(),
                identity: format!("memory:{}", export.name()),
                layers: Vec::new(),
                mark: None,
            },
            bitmap: self.switch.start.clone(),
        }
    }
}

/// What is special about one backup.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    /// Settings, limits and grants.
    pub(super) provider: Provider,
    /// A call that fails.
    pub(super) fault: Option<Fault>,
    /// The call in the midst of which the job is cancelled, by the number of those before it that can fail.
    pub(super) cut: Option<u32>,
    /// A bad sector of the first disk.
    pub(super) bad_sector: Option<Extent>,
    /// Its id, where it must not be a fresh one.
    pub(super) id: Option<BackupId>,
}

/// What became of a backup.
pub(super) struct Made {
    /// Whether it committed.
    pub(super) result: Result<Arc<Manifest>, BackupError>,
    /// The disks as of the point in time.
    pub(super) exports: Vec<Export>,
    /// All that was asked and answered.
    pub(super) trace: Vec<Conversation>,
    /// What is wrong with what was given back, where the proof failed.
    given_back: Option<Mistake>,
}

impl Subject {
    /// Of a job that nobody listens to.
    fn means(&self, program: Program, limits: &Limits) -> Means {
        let (events, _) = Events::channel();
        let account = Arc::new(Account::new(limits.clone()));
        Means::new(events, self.cancel.clone(), account, program)
    }
}

impl<'a> Stand<'a> {
    /// A VM with these disks, and an empty archive.
    pub(super) fn new(subject: &'a Subject, disks: Vec<Disk>) -> Result<Self, KitError> {
        let folder = TempDir::with_prefix_in("stand-", &subject.scratch)?;
        let path = folder.path().join("archive");
        std::fs::create_dir(&path)?;
        let archive = Archive::create(Dir::open_ambient_dir(&path, ambient_authority())?)?;
        let name = "conformance"
            .parse()
            .map_err(|_| KitError::Own("a constant is no name of a namespace"))?;
        let namespace = Arc::new(archive.create_namespace(&name)?);
        Ok(Self {
            subject,
            disks,
            namespace,
            name,
            folder,
        })
    }

    /// A backup as the subject is configured.
    pub(super) async fn backup(&mut self) -> Result<Made, KitError> {
        self.attempt(&self.subject.attempt()).await
    }

    /// A backup with something special about it. An error means that the kit or the machine failed, not the provider.
    pub(super) async fn attempt(&mut self, attempt: &Attempt) -> Result<Made, KitError> {
        let id = match attempt.id {
            Some(id) => id,
            None => BackupId::random(OffsetDateTime::now_utc())?,
        };
        let mut choices = Vec::new();
        for disk in &self.disks {
            choices.push(self.choose(disk, id)?);
        }
        let mut exports: Vec<Export> = self
            .disks
            .iter_mut()
            .zip(&choices)
            .map(|(disk, choice)| disk.freeze(&choice.switch))
            .collect();
        if let (Some(bad), false) = (attempt.bad_sector, exports.is_empty()) {
            let first = exports.remove(0);
            exports.insert(0, first.unreadable(bad));
        }
        let socket = self.folder.path().join(format!("{id}.nbd"));
        let server = Server::start(socket, exports.clone())?;
        let volumes: Vec<_> = exports
            .iter()
            .zip(&choices)
            .map(|(export, choice)| choice.uncovered(export, server.socket()))
            .collect();
        let cancel = self.subject.cancel.child_token();
        let trace = match (&attempt.fault, attempt.cut) {
            (Some(fault), _) => Trace::with_fault(fault.clone()),
            (None, Some(after)) => Trace::with_cut(Cut {
                after,
                cancel: cancel.clone(),
            }),
            (None, None) => Trace::default(),
        };
        let program = self.subject.program.clone().watched_by(trace.clone());
        let mut transfer = Transfer {
            vm: VM,
            maker: Maker {
                name: &self.subject.name,
                provider: &attempt.provider,
                component: &self.subject.component,
            },
            bytes: self.subject.bytes.clone(),
            attachments: &BTreeMap::new(),
            namespace: Arc::clone(&self.namespace),
            writer: Some(Arc::new(self.namespace.begin(id)?)),
            id,
            moment: Moment::One,
            left_out: Vec::new(),
            kept: Vec::new(),
            means: Means {
                cancel: cancel.clone(),
                ..self.subject.means(program, &attempt.provider.limits)
            },
            farewells: Farewells::default(),
        };
        let stop = cancel.child_token();
        let ran = transfer
            .run(&volumes, |_| std::future::ready(()), &stop)
            .await;
        let mut given_back = None;
        let result = match ran {
            Ok(covered) => match transfer.prove(&covered).await {
                Ok(()) => transfer.commit(covered, &volumes).await,
                Err(error) => {
                    if let (BackupError::Proof { volume, source }, Some(writer)) =
                        (&error, &transfer.writer)
                    {
                        let look = Look {
                            subject: self.subject,
                            maker: transfer.maker,
                            writer,
                            id,
                            exports: &exports,
                            backup: trace.conversations(),
                        };
                        given_back = look.at(volume, source, &covered).await;
                    }
                    Err(error)
                }
            },
            Err(error) => Err(error),
        };
        transfer.abandon().await;
        transfer.farewells.over().await;
        if self.subject.cancel.is_cancelled() {
            return Err(KitError::Cancelled);
        }
        self.settle(&choices, result.is_ok());
        Ok(Made {
            result: result.map(Arc::new),
            exports,
            trace: trace.conversations(),
            given_back,
        })
    }

    /// The kit's disks have one image and never more than one bitmap that records, so that only the archive and the
    /// disk's size decide.
    fn choose(&self, disk: &Disk, id: BackupId) -> Result<Choice, KitError> {
        let start = Some(id.to_string());
        let Some(since) = disk.recording().next().map(str::to_owned) else {
            return Ok(Choice {
                switch: Switch { stop: None, start },
                base: None,
                reason: None,
                stale: None,
            });
        };
        Ok(match self.base(disk, &since)? {
            Ok(base) => Choice {
                switch: Switch {
                    stop: Some(since),
                    start,
                },
                base: Some(base),
                reason: None,
                stale: None,
            },
            Err(reason) => Choice {
                switch: Switch { stop: None, start },
                base: None,
                reason: Some(reason),
                stale: Some(since),
            },
        })
    }

    /// The backup `since` as a base for `disk`, or why it is none.
    fn base(&self, disk: &Disk, since: &str) -> Result<Result<Base, String>, KitError> {
        let id = since.parse();
        let id = id.map_err(|_| KitError::Own("a bitmap of its own names no backup"))?;
        let manifest = match recover::recorded(&self.namespace, id)? {
            Recorded::Committed(manifest) => manifest,
            Recorded::Exported(_) => return Err(KitError::Own("its archive holds an export")),
            Recorded::Damaged { reason } => {
                return Ok(Err(format!("the base {id} is damaged: {reason}")));
            }
            Recorded::Absent => {
                return Ok(Err(format!("the archive holds no backup {id} to build on")));
            }
        };
        let mut volumes = manifest.record.volumes.iter();
        let volume = volumes.find(|it| it.name == disk.name()).cloned();
        Ok(match volume {
            Some(volume) if volume.root.size() == disk.size() => Ok(Base { manifest, volume }),
            Some(volume) => Err(format!(
                "it had {} bytes in the base {id} and has {} now",
                volume.root.size(),
                disk.size()
            )),
            None => Err(format!("the base {id} does not hold it")),
        })
    }

    fn settle(&mut self, choices: &[Choice], committed: bool) {
        for (disk, choice) in self.disks.iter_mut().zip(choices) {
            if committed {
                disk.accept(&choice.switch);
                if let Some(stale) = &choice.stale {
                    disk.forget(stale);
                }
            } else {
                disk.back_out(&choice.switch);
            }
        }
    }

    /// Restores a backup and compares every byte with what its disks held. What is said is the first difference.
    pub(super) async fn restore(
        &self,
        made: &Made,
        manifest: &Arc<Manifest>,
    ) -> Result<(), Mistake> {
        for (volume, export) in manifest.record.volumes.iter().zip(&made.exports) {
            let restored = self.restore_volume(manifest, &volume.name).await;
            match restored {
                Ok(bytes) if bytes[..] == export.bytes()[..] => {}
                Ok(bytes) => {
                    return Err(diagnosis::restored_otherwise(&volume.name, &bytes, export));
                }
                Err(error) => return Err(diagnosis::not_restored(&volume.name, &error)),
            }
        }
        Ok(())
    }

    async fn restore_volume(
        &self,
        manifest: &Arc<Manifest>,
        name: &str,
    ) -> Result<Vec<u8>, String> {
        let volume = manifest.record.volumes.iter().find(|it| it.name == name);
        let volume = volume.ok_or("it is not in the manifest")?;
        let size = volume.root.size();
        let file =
            tempfile::tempfile_in(self.folder.path()).map_err(|error| with_causes(&error))?;
        file.set_len(size).map_err(|error| with_causes(&error))?;
        let file = Arc::new(file);
        let config = Config::default();
        let reading = Reading::new(&config, &self.namespace, manifest, BTreeSet::new());
        let program = self.subject.program.clone();
        let wanted = ReadBack {
            reading: &reading,
            volume,
            output: Some(Arc::<File>::clone(&file)),
            cache: &self.subject.cache,
            means: &self.subject.means(program, &Limits::default()),
            all_findings: false,
        };
        let findings = read_back::read_back(wanted)
            .await
            .map_err(|error| with_causes(&error))?;
        if let Some(finding) = findings.first() {
            return Err(with_causes(finding));
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|error| with_causes(&error))?;
        Ok(bytes)
    }

    /// Makes the archive forget a backup, as a retention would.
    pub(super) fn forget(&self, manifest: &Manifest) -> Result<(), KitError> {
        let path = format!(
            "archive/namespaces/{}/backups/{}",
            self.name, manifest.backup
        );
        Ok(std::fs::remove_dir_all(self.folder.path().join(path))?)
    }

    /// How many backups the archive holds.
    pub(super) fn backups(&self) -> Result<usize, KitError> {
        Ok(self.namespace.backups()?.len())
    }

    /// Opens what one volume of a backup claimed.
    pub(super) async fn open_image(
        &self,
        manifest: &Manifest,
        name: &str,
    ) -> Result<Image, ImageError> {
        let provider = &manifest.record.provider;
        let volume = manifest.record.volumes.iter().find(|it| it.name == name);
        let open = claims::image(
            &self.subject.component,
            manifest.backup,
            provider.settings.clone(),
            volume.map(|it| it.receipt.clone()).unwrap_or_default(),
            provider.limits,
        );
        let (events, _) = Events::channel();
        Image::open(
            &self.subject.program,
            open,
            &self.subject.component.compiled,
            self.namespace.objects(manifest),
            &Arc::new(Account::new(self.subject.provider.limits.clone())),
            name,
            &events,
            Purpose::Restore,
        )
        .await
    }

    /// The archive's view of a namespace, for what only the block table knows.
    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

impl Made {
    /// The committed backup, or what the provider did wrong.
    pub(super) fn committed(&self) -> Result<&Arc<Manifest>, Mistake> {
        match (&self.result, &self.given_back) {
            (Ok(manifest), _) => match diagnosis::leaked(&self.trace) {
                Some(mistake) => Err(mistake),
                None => Ok(manifest),
            },
            (Err(_), Some(mistake)) => Err(mistake.clone()),
            (Err(error), None) => Err(diagnosis::failed(error, &self.exports, &self.trace)),
        }
    }

    /// Why the machine failed at it, where the provider did not.
    pub(super) fn own_failure(&self) -> Option<KitError> {
        match &self.result {
            Err(
                error @ (BackupError::Archive(_)
                | BackupError::Task(_)
                | BackupError::Volume {
                    source:
                        VolumeError::Archive(_)
                        | VolumeError::Sandbox(_)
                        | VolumeError::Snapshot(_)
                        | VolumeError::Run(RunError::Host(_)),
                    ..
                }
                | BackupError::Proof {
                    source: ProofError::Archive(_) | ProofError::Task(_),
                    ..
                }),
            ) => Some(KitError::Host(with_causes(error))),
            _ => None,
        }
    }

    /// The run on one volume.
    pub(super) fn run(&self, volume: &str) -> Option<&Conversation> {
        let named = |it: &&Conversation| it.volume.as_deref() == Some(volume);
        self.trace.iter().find(named)
    }
}

/// A closer look at what a provider gives back, before the backup that failed for it is gone.
struct Look<'a> {
    subject: &'a Subject,
    maker: Maker<'a>,
    writer: &'a Arc<BackupWriter>,
    id: BackupId,
    exports: &'a [Export],
    /// What was asked in this backup so far.
    backup: Vec<Conversation>,
}

impl Look<'_> {
    async fn at(&self, volume: &str, error: &ProofError, covered: &[Covered]) -> Option<Mistake> {
        let covered = covered.iter().find(|it| it.name == volume)?;
        let extent = match error {
            ProofError::Wrong { extent } => Some(*extent),
            ProofError::NotGivenBack { extent, .. } => Some(*extent),
            ProofError::Open(_) | ProofError::WallTime { .. } => None,
            ProofError::Archive(_) | ProofError::Task(_) | ProofError::Cancelled => return None,
        };
        let trace = Trace::default();
        let program = self.subject.program.clone().watched_by(trace.clone());
        let given = self.read(program, covered, extent).await;
        let image = trace.conversations();
        Some(diagnosis::given_back(
            volume,
            error,
            given.as_deref(),
            extent,
            self.exports,
            covered.receipt.len(),
            &self.backup,
            &image,
        ))
    }

    async fn read(
        &self,
        program: Program,
        covered: &Covered,
        extent: Option<Extent>,
    ) -> Option<Vec<u8>> {
        let proving = Proving {
            covered,
            maker: self.maker,
            writer: self.writer,
            backup: self.id,
            means: &self.subject.means(program, &self.maker.provider.limits),
        };
        let claims = proving.claims();
        let first = extent.or_else(|| covered.claimed.iter().next())?;
        let mut asking = claims.ask(segment_of(first.start())).await.ok()?;
        let extent = extent?;
        loop {
            let (question, answer) = asking.next().await?;
            if question.extent.contains(extent) {
                let skip = (extent.start() - question.extent.start()) as usize;
                let bytes = answer.ok()?;
                return Some(bytes.get(skip..skip + extent.len() as usize)?.to_vec());
            }
        }
    }
}
