//! The kernel programs' other half: loads them, reads their rings, and asks them for the complete list.
//!
//! Output: observations. Must never take a ring that overflowed for a quiet one: each loss asks for a new list.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
    mem,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd as _, AsRawFd},
        unix::fs::MetadataExt as _,
    },
    path::PathBuf,
    time::Duration,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{MapData, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Iter, ProgramError},
};
use aya_log::EbpfLogger;
use rebalancer_common::{
    HelloRecord, KIND_CLOSED, KIND_LISTENER, KIND_OPENED, LOST_EVENTS, LOST_HELLOS, LOST_STORAGE, Offsets, SocketRecord,
};
use rebalancer_core::{
    btf,
    hello::Assembly,
    ids::{ConnectionId, Protocol},
    observation::{Observation, Socket},
};
use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyMutGuard},
    },
    time::{Interval, MissedTickBehavior, interval},
};

use super::KernelLog;

/// The object that `cargo xtask build-ebpf` made, or nothing.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rebalancer-ebpf.o"));

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// How often the rings are looked at: the programs wake nobody for a few events.
const LOOK: Duration = Duration::from_millis(100);

/// How often the loss counters are looked at.
const CHECK: Duration = Duration::from_secs(1);

/// How often the byte counters are told.
const COUNTERS_EVERY: u32 = 10;

/// Hellos that are not whole yet; beyond that the oldest connections stay unknown.
const ASSEMBLIES: usize = 16_384;

const ESTABLISHED: u32 = 1;

/// Why the kernel programs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// The binary carries none.
    #[error("this build carries no kernel programs: run `cargo xtask build-ebpf` before `cargo build`")]
    NotBuilt,
    /// The kernel has no type information.
    #[error("cannot read {BTF}: {0}; the kernel must be built with CONFIG_DEBUG_INFO_BTF, as distributions' are")]
    NoBtf(io::Error),
    /// The type information lacks something.
    #[error(transparent)]
    Btf(#[from] btf::BtfError),
    /// There is no cgroup v2 hierarchy.
    #[error("no cgroup2 filesystem is mounted: ClientHellos are read at its root")]
    NoCgroup,
    /// The kernel refused.
    #[error("the kernel refuses {what}: {why}{}{}", hint(.why), super::release::hint())]
    Refused {
        /// What.
        what: &'static str,
        /// What it said.
        why: String,
    },
    /// A file or ring failed.
    #[error("{what}: {source}")]
    Io {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What to do about a refusal.
fn hint(why: &str) -> &'static str {
    if why.contains("EPERM") || why.contains("Operation not permitted") || why.contains("os error 1)") {
        "; the agent needs the capabilities CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, or root"
    } else {
        ""
    }
}

fn refused(what: &'static str) -> impl FnOnce(&dyn std::error::Error) -> EbpfError {
    move |error| {
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            let said = inner.to_string();
            // Some errors show their cause themselves.
            if !why.contains(&said) {
                why = format!("{why}: {said}");
            }
            cause = inner.source();
        }
        EbpfError::Refused {
            what,
            why: shortened(&why),
        }
    }
}

/// The verifier's log can be thousands of lines: its beginning names the call, its end the reason.
fn shortened(why: &str) -> String {
    const LINES: usize = 6;
    let lines: Vec<&str> = why.lines().collect();
    if lines.len() <= 2 * LINES {
        return why.to_owned();
    }
    let left_out = lines.len() - 1 - LINES;
    format!(
        "{}\n  … {left_out} lines …\n{}",
        lines[0],
        lines[lines.len() - LINES..].join("\n")
    )
}

/// The loaded programs.
pub struct Programs {
    ebpf: Ebpf,
    events: AsyncFd<RingBuf<MapData>>,
    hellos: AsyncFd<RingBuf<MapData>>,
    /// What the programs say of themselves; `None` when that is off.
    log: Option<AsyncFd<EbpfLogger<&'static dyn log::Log>>>,
    lost: PerCpuArray<MapData, u64>,
    counted_lost: [u64; 3],
    assemblies: HashMap<u64, Assembly>,
    looks: Interval,
    ticks: Interval,
    tick: u32,
    resync: bool,
    listener_moved: bool,
}

impl Programs {
    /// Loads and attaches, for one port in this process's network namespace.
    ///
    /// # Errors
    ///
    /// See [`EbpfError`].
    pub fn open(port: u16, log: KernelLog) -> Result<Self, EbpfError> {
        if OBJECT.is_empty() {
            return Err(EbpfError::NotBuilt);
        }
        let offsets = offsets(&fs::read(BTF).map_err(EbpfError::NoBtf)?, port)?;
        let kernel_btf = Btf::from_sys_fs().map_err(|error| refused("its own type information")(&error))?;
        let mut ebpf = EbpfLoader::new()
            .override_global("OFFSETS", &offsets, true)
            .override_global(aya_log::LEVEL, &(log as u8), true)
            .load(OBJECT)
            .map_err(|error| refused("the maps")(&error))?;

        let state: &mut BtfTracePoint = program(&mut ebpf, "socket_state")?;
        let attached = state
            .load("inet_sock_set_state", &kernel_btf)
            .and_then(|()| state.attach().map(|_| ()));
        attached.map_err(|error| refused("the program that counts connections")(&error))?;

        let hello: &mut CgroupSkb = program(&mut ebpf, "client_hello")?;
        let root = File::open(cgroup2()?).map_err(|source| EbpfError::Io {
            what: "the root of cgroup2",
            source,
        })?;
        let attached = hello.load().and_then(|()| {
            hello
                .attach(root.as_fd(), CgroupSkbAttachType::Ingress, CgroupAttachMode::Single)
                .map(|_| ())
        });
        attached.map_err(|error| refused("the program that reads ClientHellos")(&error))?;

        let list: &mut Iter = program(&mut ebpf, "list_sockets")?;
        list.load("tcp", &kernel_btf)
            .map_err(|error| refused("the program that lists sockets")(&error))?;

        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        Ok(Self {
            events: ring(&mut ebpf, "EVENTS")?,
            hellos: ring(&mut ebpf, "HELLOS")?,
            log: match log {
                KernelLog::Off => None,
                _ => Some(logger(&mut ebpf)?),
            },
            lost: take(&mut ebpf, "LOST")
                .and_then(|map| PerCpuArray::try_from(map).map_err(|error| refused("a map")(&error)))?,
            counted_lost: [0; 3],
            assemblies: HashMap::new(),
            looks: every(LOOK),
            ticks: every(CHECK),
            tick: 0,
            resync: true,
            listener_moved: false,
            ebpf,
        })
    }

    /// Makes the next observation a complete list.
    pub fn resync(&mut self) {
        self.resync = true;
    }

    /// Waits for something to tell.
    ///
    /// # Errors
    ///
    /// The list or a ring cannot be read any more.
    pub async fn next(&mut self) -> Result<Vec<Observation>, EbpfError> {
        loop {
            if mem::take(&mut self.resync) {
                return self.complete();
            }
            tokio::select! {
                ready = self.events.readable() => ready.map_err(ring_failed)?.clear_ready(),
                ready = self.hellos.readable() => ready.map_err(ring_failed)?.clear_ready(),
                ready = readable(&mut self.log) => {
                    let mut ready = ready.map_err(ring_failed)?;
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
                _ = self.looks.tick() => {}
                _ = self.ticks.tick() => {
                    let observations = self.check()?;
                    if !observations.is_empty() {
                        return Ok(observations);
                    }
                }
            }
            // No await from here on: what is taken from a ring is told.
            let observations = self.drain();
            if !observations.is_empty() {
                return Ok(observations);
            }
        }
    }

    /// The complete list, and what happened while it was made.
    fn complete(&mut self) -> Result<Vec<Observation>, EbpfError> {
        // Events before the list are in the list, or are of connections that are gone; later ones come after it. Those
        // in between come after it as well, where an open that is known and a close that is done change nothing.
        let sockets = self.list()?;
        let (established, listening): (Vec<_>, Vec<_>) =
            sockets.into_iter().partition(|record| record.state == ESTABLISHED);
        let mut observations = vec![Observation::Resync {
            sockets: established.iter().map(socket).collect(),
            listener: listening.iter().map(|record| ConnectionId(record.cookie)).max(),
        }];
        observations.extend(self.drain());
        Ok(observations)
    }

    /// Reads the iterator to its end.
    fn list(&mut self) -> Result<Vec<SocketRecord>, EbpfError> {
        let list: &mut Iter = program(&mut self.ebpf, "list_sockets")?;
        let failed = |error: &dyn std::error::Error| refused("to list sockets")(error);
        let link = list
            .attach()
            .and_then(|id| list.take_link(id))
            .map_err(|error: ProgramError| failed(&error))?;
        let mut bytes = Vec::new();
        link.into_file()
            .map_err(|error| failed(&error))?
            .read_to_end(&mut bytes)
            .map_err(|source| EbpfError::Io {
                what: "the list of sockets",
                source,
            })?;
        Ok(bytes
            .chunks_exact(mem::size_of::<SocketRecord>())
            .filter_map(record)
            .collect())
    }

    /// Looks at the loss counters, and now and then at the byte counters.
    fn check(&mut self) -> Result<Vec<Observation>, EbpfError> {
        let mut newly = [0; 3];
        for (index, name) in [LOST_EVENTS, LOST_HELLOS, LOST_STORAGE].into_iter().enumerate() {
            let total: u64 = self
                .lost
                .get(&name, 0)
                .map_err(|error| refused("to read a counter")(&error))?
                .iter()
                .sum();
            newly[index] = total - mem::replace(&mut self.counted_lost[index], total);
        }
        if newly[1] + newly[2] > 0 {
            tracing::warn!(
                hellos = newly[1],
                storage = newly[2],
                "ClientHellos were lost: these connections stay unknown until the shim names their protocol"
            );
        }
        if newly[0] > 0 {
            tracing::warn!(
                events = newly[0],
                "socket events were lost: asking for the complete list"
            );
            return Ok(vec![Observation::Lost { events: newly[0] }]);
        }
        if mem::take(&mut self.listener_moved) {
            return self.complete();
        }
        self.tick += 1;
        if !self.tick.is_multiple_of(COUNTERS_EVERY) {
            return Ok(Vec::new());
        }
        let counters = self.list()?;
        let counters = counters
            .iter()
            .filter(|record| record.state == ESTABLISHED)
            .map(|record| (ConnectionId(record.cookie), record.bytes_in, record.bytes_out))
            .collect();
        Ok(vec![Observation::Counters(counters)])
    }

    /// Takes all that is in the rings.
    fn drain(&mut self) -> Vec<Observation> {
        // The hellos first: whatever opened before them is in the other ring by then.
        let mut classified = Vec::new();
        while let Some(item) = self.hellos.get_mut().next() {
            let Some((cookie, offset, payload)) = hello(&item) else {
                continue;
            };
            if !self.assemblies.contains_key(&cookie) && self.assemblies.len() == ASSEMBLIES {
                continue;
            }
            let assembly = self.assemblies.entry(cookie).or_default();
            if let Some(protocol) = assembly.add(offset, payload) {
                self.assemblies.remove(&cookie);
                if protocol != Protocol::Unknown {
                    classified.push(Observation::Classified {
                        id: ConnectionId(cookie),
                        protocol,
                    });
                }
            }
        }
        let mut observations = Vec::new();
        while let Some(item) = self.events.get_mut().next() {
            let Some(event) = record(&item) else {
                continue;
            };
            match event.kind {
                KIND_OPENED => observations.push(Observation::Opened(socket(&event))),
                KIND_CLOSED => {
                    self.assemblies.remove(&event.cookie);
                    observations.push(Observation::Closed {
                        id: ConnectionId(event.cookie),
                        bytes_in: event.bytes_in,
                        bytes_out: event.bytes_out,
                    });
                }
                // The state changes a moment before the socket can be listed: the list is taken now and once more.
                KIND_LISTENER => {
                    self.resync = true;
                    self.listener_moved = true;
                }
                _ => {}
            }
        }
        observations.extend(classified);
        observations
    }
}

fn ring_failed(source: io::Error) -> EbpfError {
    EbpfError::Io {
        what: "a ring buffer",
        source,
    }
}

fn logger(ebpf: &mut Ebpf) -> Result<AsyncFd<EbpfLogger<&'static dyn log::Log>>, EbpfError> {
    let logger = EbpfLogger::init(ebpf).map_err(|error| refused("the programs' log")(&error))?;
    // SAFETY: the logger owns its ring's descriptor and keeps it open, the same one, for as long as it lives.
    unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }.map_err(|error| ring_failed(error.into()))
}

/// Ready when the programs said something; never when their log is off.
async fn readable<T: AsRawFd>(log: &mut Option<AsyncFd<T>>) -> io::Result<AsyncFdReadyMutGuard<'_, T>> {
    match log {
        Some(log) => log.readable_mut().await,
        None => std::future::pending().await,
    }
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, EbpfError> {
    ebpf.take_map(name).ok_or_else(|| EbpfError::Refused {
        what: "a map",
        why: format!("the object has no map {name}"),
    })
}

fn ring(ebpf: &mut Ebpf, name: &'static str) -> Result<AsyncFd<RingBuf<MapData>>, EbpfError> {
    let ring = RingBuf::try_from(take(ebpf, name)?).map_err(|error| refused("a ring buffer")(&error))?;
    // SAFETY: the ring buffer owns its map's descriptor and keeps it open, the same one, for as long as it lives.
    unsafe { AsyncFd::register(ring) }.map_err(|error| ring_failed(error.into()))
}

fn program<'a, T>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, EbpfError>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let missing = || EbpfError::Refused {
        what: "a program",
        why: format!("the object has no program {name}"),
    };
    ebpf.program_mut(name)
        .ok_or_else(missing)?
        .try_into()
        .map_err(|error: ProgramError| refused("a program")(&error))
}

/// Where the kernel's members are, and what is watched.
fn offsets(blob: &[u8], port: u16) -> Result<Offsets, EbpfError> {
    let btf = btf::Btf::parse(blob)?;
    let common = |member| btf.offset("sock_common", member);
    let tcp = |member| btf.offset("tcp_sock", member);
    let netns = fs::metadata("/proc/self/ns/net").map_err(|source| EbpfError::Io {
        what: "/proc/self/ns/net",
        source,
    })?;
    Ok(Offsets {
        family: common("skc_family")?,
        state: common("skc_state")?,
        num: common("skc_num")?,
        dport: common("skc_dport")?,
        daddr: common("skc_daddr")?,
        rcv_saddr: common("skc_rcv_saddr")?,
        v6_daddr: common("skc_v6_daddr")?,
        v6_rcv_saddr: common("skc_v6_rcv_saddr")?,
        net: common("skc_net")?,
        inum: btf.offset("net", "ns")? + btf.offset("ns_common", "inum")?,
        bytes_received: tcp("bytes_received")?,
        bytes_acked: tcp("bytes_acked")?,
        port: u32::from(port),
        netns: u32::try_from(netns.ino()).unwrap_or(0),
    })
}

/// Where cgroup v2 is mounted.
fn cgroup2() -> Result<PathBuf, EbpfError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|source| EbpfError::Io {
        what: "/proc/self/mounts",
        source,
    })?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    });
    mount.ok_or(EbpfError::NoCgroup)
}

/// Reads a record; `None` when it is not whole.
fn record(bytes: &[u8]) -> Option<SocketRecord> {
    let word = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u64::from_ne_bytes(*chunk));
    let half = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk));
    Some(SocketRecord {
        cookie: word(mem::offset_of!(SocketRecord, cookie))?,
        bytes_in: word(mem::offset_of!(SocketRecord, bytes_in))?,
        bytes_out: word(mem::offset_of!(SocketRecord, bytes_out))?,
        local: *bytes.get(mem::offset_of!(SocketRecord, local)..)?.first_chunk()?,
        remote: *bytes.get(mem::offset_of!(SocketRecord, remote)..)?.first_chunk()?,
        local_port: half(mem::offset_of!(SocketRecord, local_port))?,
        remote_port: half(mem::offset_of!(SocketRecord, remote_port))?,
        kind: half(mem::offset_of!(SocketRecord, kind))?,
        state: half(mem::offset_of!(SocketRecord, state))?,
    })
}

/// Reads a hello's cookie, offset and payload; `None` when it is not whole.
fn hello(bytes: &[u8]) -> Option<(u64, usize, &[u8])> {
    let half = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk));
    let cookie = u64::from_ne_bytes(*bytes.first_chunk()?);
    let offset = half(mem::offset_of!(HelloRecord, offset))? as usize;
    let length = half(mem::offset_of!(HelloRecord, length))? as usize;
    let data = bytes.get(mem::offset_of!(HelloRecord, data)..)?;
    Some((cookie, offset, data.get(..length)?))
}

fn socket(record: &SocketRecord) -> Socket {
    let address = |octets: [u8; 16], port: u32| {
        let ip = IpAddr::V6(Ipv6Addr::from(octets)).to_canonical();
        SocketAddr::new(ip, u16::try_from(port).unwrap_or(0))
    };
    Socket {
        id: ConnectionId(record.cookie),
        local: address(record.local, record.local_port),
        remote: address(record.remote, record.remote_port),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
    }
}
