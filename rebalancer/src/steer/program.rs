//! The kernel program and its maps.
//!
//! Job: load it, and speak with it through its maps. Must never hide why the kernel refused it.

use std::{
    io,
    num::NonZeroU32,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray},
    programs::{
        ProgramError, UProbe,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeScope},
    },
};
use rebalancer_common::steer::{ANSWERS, ClientKey, Consumers, Place, Victim};

use super::{SteerError, batch, consumers};

/// The object that `cargo xtask build-ebpf` made, or nothing.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rebalancer-steer.o"));

/// What is put at an apiserver's decision.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub(super) object: &'static [u8],
    pub(super) name: &'static str,
}

impl Part {
    /// The program that answers.
    pub const STEER: Self = Self {
        object: OBJECT,
        name: "steer",
    };
}

/// The loaded program.
pub struct Program {
    ebpf: Ebpf,
    part: Part,
    victims: HashMap<MapData, ClientKey, Victim>,
    requests: HashMap<MapData, ClientKey, u64>,
    /// The map of requests once more, to be read in one piece.
    all_requests: OwnedFd,
    answered: PerCpuArray<MapData, u64>,
}

/// Loads the program and lets it go again: whether this kernel takes it.
///
/// # Errors
///
/// Why not.
pub fn trial_load() -> Result<(), SteerError> {
    Program::load(Part::STEER, Place::default()).map(|_| ())
}

impl Program {
    /// Loads it, with what it is to know as constants: all but the kernel's own structures, which are looked up here.
    ///
    /// # Errors
    ///
    /// The kernel's reason.
    pub fn load(part: Part, place: Place) -> Result<Self, SteerError> {
        let why = match consumers::offsets() {
            Ok(consumers) => match Self::load_as(part, Place { consumers, ..place }) {
                // With lockdown=confidentiality no program reads the kernel's memory: what remains is worth having.
                Err(SteerError::Kernel { why } | SteerError::NotPermitted { why, .. }) => why,
                loaded => return loaded,
            },
            Err(why) => why,
        };
        let consumers = Consumers::default();
        let program = Self::load_as(part, Place { consumers, ..place })?;
        tracing::warn!(
            "another tool's probe on the decider's return would not be noticed, and would end the apiserver: do not put \
             one there ({why})"
        );
        Ok(program)
    }

    fn load_as(part: Part, place: Place) -> Result<Self, SteerError> {
        if part.object.is_empty() {
            return Err(SteerError::NotBuilt);
        }
        let mut ebpf = EbpfLoader::new()
            .override_global("PLACE", &place, true)
            .load(part.object)
            .map_err(|error| refused(&error))?;
        let victims = map(&mut ebpf, "VICTIMS")?;
        let requests = map(&mut ebpf, "REQUESTS")?;
        let answered = map(&mut ebpf, "ANSWERED")?;
        let all_requests = match &requests {
            Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned(),
            _ => Err(io::Error::other("it is no hash map")),
        };
        let mut program = Self {
            victims: HashMap::try_from(victims).map_err(|error| refused(&error))?,
            requests: HashMap::try_from(requests).map_err(|error| refused(&error))?,
            all_requests: all_requests.map_err(SteerError::io("the map of requests"))?,
            answered: PerCpuArray::try_from(answered).map_err(|error| refused(&error))?,
            ebpf,
            part,
        };
        program.uprobe()?.load().map_err(|error| refused(&error))?;
        Ok(program)
    }

    /// Puts it on one process, at an offset in its binary; it goes when this value goes, or this process.
    ///
    /// # Errors
    ///
    /// The kernel's reason.
    pub fn attach(&mut self, pid: u32, binary: &Path, offset: u64) -> Result<(), SteerError> {
        let failed = |why: String| SteerError::Attach { pid, why };
        let scope = NonZeroU32::new(pid)
            .map(UProbeScope::OneProcess)
            .ok_or_else(|| failed("it is no process".to_owned()))?;
        let point = UProbeAttachPoint {
            location: UProbeAttachLocation::AbsoluteOffset(offset),
            cookie: None,
        };
        self.uprobe()?
            .attach(point, binary, scope)
            .map(|_| ())
            .map_err(|error| failed(chain(&error)))
    }

    /// The program's number in the kernel, and how many instructions it has there.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn size(&mut self) -> Result<(u32, u32), SteerError> {
        // include/uapi/linux/bpf.h, `struct bpf_insn`
        const INSTRUCTION: u32 = 8;
        let info = self.uprobe()?.info().map_err(|error| refused(&error))?;
        Ok((info.id(), info.size_translated().unwrap_or_default() / INSTRUCTION))
    }

    fn uprobe(&mut self) -> Result<&mut UProbe, SteerError> {
        let name = self.part.name;
        let missing = || SteerError::Kernel {
            why: format!("the object has no program {name}"),
        };
        self.ebpf
            .program_mut(name)
            .ok_or_else(missing)?
            .try_into()
            .map_err(|error: ProgramError| refused(&error))
    }

    /// Makes a connection a victim.
    ///
    /// # Errors
    ///
    /// The map is full.
    pub fn mark(&mut self, client: &ClientKey, victim: Victim) -> Result<(), SteerError> {
        self.victims.insert(client, victim, 0).map_err(map_failed)
    }

    /// Makes it none.
    ///
    /// # Errors
    ///
    /// The map cannot be changed.
    pub fn unmark(&mut self, client: &ClientKey) -> Result<(), SteerError> {
        absent_is_fine(self.victims.remove(client)).map(|_| ())
    }

    /// How often a victim was told; `None` when it is none.
    ///
    /// # Errors
    ///
    /// The map cannot be read.
    pub fn told(&self, client: &ClientKey) -> Result<Option<u64>, SteerError> {
        Ok(absent_is_fine(self.victims.get(client, 0))?.map(|victim| victim.told))
    }

    /// The requests of every connection so far.
    ///
    /// # Errors
    ///
    /// The map cannot be read.
    pub fn requests(&self) -> Result<Vec<(ClientKey, u64)>, SteerError> {
        batch::entries(self.all_requests.as_fd()).map_err(SteerError::io("the map of requests"))
    }

    /// Forgets a connection's requests: it is closed.
    ///
    /// # Errors
    ///
    /// The map cannot be changed.
    pub fn forget(&mut self, client: &ClientKey) -> Result<(), SteerError> {
        absent_is_fine(self.requests.remove(client)).map(|_| ())
    }

    /// What was answered, by the `ANSWER_` constants.
    ///
    /// # Errors
    ///
    /// The map cannot be read.
    pub fn answered(&self) -> Result<[u64; ANSWERS as usize], SteerError> {
        let mut sums = [0; ANSWERS as usize];
        for (index, sum) in (0..).zip(&mut sums) {
            let values = self.answered.get(&index, 0).map_err(map_failed)?;
            *sum = values.iter().sum();
        }
        Ok(sums)
    }
}

fn map(ebpf: &mut Ebpf, name: &str) -> Result<Map, SteerError> {
    ebpf.take_map(name).ok_or_else(|| SteerError::Kernel {
        why: format!("the object has no map {name}"),
    })
}

fn absent_is_fine<T>(result: Result<T, MapError>) -> Result<Option<T>, SteerError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(map_failed(error)),
    }
}

fn map_failed(error: MapError) -> SteerError {
    SteerError::Io {
        what: "a map of the kernel program".to_owned(),
        source: io::Error::other(chain(&error)),
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = inner.source();
    }
    text
}

/// The kernel's reason in a few words: of a verifier's log, the last line that says one.
fn refused(error: &(dyn std::error::Error + 'static)) -> SteerError {
    let text = chain(error);
    let denied = ["EPERM", "Operation not permitted", "os error 1)"]
        .iter()
        .any(|sign| text.contains(sign));
    if denied {
        return SteerError::NotPermitted {
            what: "loading the kernel program".to_owned(),
            why: text.lines().next().unwrap_or_default().to_owned(),
        };
    }
    let reason = text.lines().map(str::trim).rfind(|line| {
        const STATISTICS: [&str; 3] = ["processed ", "verification time", "stack depth"];
        !line.is_empty() && !STATISTICS.iter().any(|begin| line.starts_with(begin))
    });
    SteerError::Kernel {
        why: reason.unwrap_or(&text).to_owned(),
    }
}
