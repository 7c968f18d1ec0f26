//! The kernel programs' other half: loads them, reads what they write, and asks them for the complete list.
//!
//! Output: observations. Must never take events that were overwritten for a quiet time: each loss asks for a new list.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{self, Read as _},
    mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, MapData, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, CgroupSkb, Iter, ProgramError},
};
use aya_log::EbpfLogger;
use rebalancer_common::{
    KIND_CLOSED, KIND_JOINED, KIND_OPENED, LOST_COUNTERS, LOST_EVENTS, LOST_HELLOS, LOST_STORAGE, Offsets, SocketRecord,
};
use rebalancer_core::{
    ids::{ConnectionId, Protocol, Timestamp},
    observation::{HelloLoss, Observation, Socket},
    subflows::Subflows,
    wire::hellos::Hellos,
};
use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyMutGuard},
    },
    time::{Interval, MissedTickBehavior, interval},
};

use super::{
    KernelLog, Options, addresses,
    ebpf_error::{BTF, EbpfError, refused},
    events::Events,
    hook::Hook,
    offsets::offsets,
    records::{hello, opened, record, subflow},
    sockdiag,
};

/// The object that `cargo xtask build-ebpf` made, or nothing.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rebalancer-ebpf.o"));

/// How often it is looked what the programs wrote: they wake nobody for it. There is room for 160,000 events a second.
const LOOK: Duration = Duration::from_millis(100);

/// How often the loss counters are looked at.
const CHECK: Duration = Duration::from_secs(1);

/// How often the complete list is read beside: it brings the byte counters, and repairs what events missed.
const LIST_EVERY: u32 = 5;

/// How often lost hellos are worth a line.
const SAY_EVERY: u32 = 10;

const ESTABLISHED: u32 = 1;

/// The loaded programs.
pub struct Programs {
    ebpf: Ebpf,
    events: Events,
    /// A word for each socket that began or ceased to listen.
    listeners: AsyncFd<RingBuf<MapData>>,
    hellos: AsyncFd<RingBuf<MapData>>,
    /// What the programs say of themselves; `None` when that is off.
    log: Option<AsyncFd<EbpfLogger<&'static dyn log::Log>>>,
    lost: PerCpuArray<MapData, u64>,
    counted_lost: [u64; LOST_COUNTERS as usize],
    /// Runs of the program that counts which the kernel left out.
    counted_misses: u64,
    hellos_begun: Hellos,
    subflows: Subflows,
    counted_given_up: u64,
    /// Hellos that were not whole when their connections had taken all of the ring that one may.
    cut_off: u64,
    malformed: u64,
    /// Hellos that were lost since the last line about them.
    unsaid: BTreeMap<HelloLoss, u64>,
    /// Where ClientHellos are read; `None` when they are not to be.
    hook: Option<Hook>,
    /// Why they are not read, or where they are, as it was told last.
    reading: Option<Result<String, String>>,
    own: Vec<IpAddr>,
    port: u16,
    began: Instant,
    looks: Interval,
    ticks: Interval,
    tick: u32,
    resync: bool,
    confirm: bool,
    listener_moved: bool,
}

impl Programs {
    /// Loads and attaches, for one port in this process's network namespace.
    ///
    /// # Errors
    ///
    /// See [`EbpfError`].
    pub fn open(options: &Options) -> Result<Self, EbpfError> {
        if OBJECT.is_empty() {
            return Err(EbpfError::NotBuilt);
        }
        let offsets = offsets(&fs::read(BTF).map_err(EbpfError::NoBtf)?, options)?;
        let without_mptcp = Offsets { is_mptcp: 0, ..offsets };
        match Self::load(options, &offsets) {
            // What tells a further subflow from a client's first is refused in lockdown: each is a connection there.
            Err(refused) if offsets.is_mptcp != 0 => match Self::load(options, &without_mptcp) {
                Ok(loaded) => {
                    tracing::warn!("further subflows of MPTCP clients are counted as connections: {refused}");
                    Ok(loaded)
                }
                Err(_) => Err(refused),
            },
            loaded => loaded,
        }
    }

    fn load(options: &Options, offsets: &Offsets) -> Result<Self, EbpfError> {
        let log = options.kernel_log;
        let kernel_btf = Btf::from_sys_fs().map_err(|error| refused("its own type information")(&error))?;
        let mut ebpf = EbpfLoader::new()
            .override_global("OFFSETS", offsets, true)
            .override_global(aya_log::LEVEL, &(log as u8), true)
            .load(OBJECT)
            .map_err(|error| refused("the maps")(&error))?;

        let state: &mut BtfTracePoint = program(&mut ebpf, "socket_state")?;
        let attached = state
            .load("inet_sock_set_state", &kernel_btf)
            .and_then(|()| state.attach().map(|_| ()));
        attached.map_err(|error| refused("the program that counts connections")(&error))?;

        if options.classify {
            let hello: &mut CgroupSkb = program(&mut ebpf, "client_hello")?;
            hello
                .load()
                .map_err(|error| refused("the program that reads ClientHellos")(&error))?;
        }

        let list: &mut Iter = program(&mut ebpf, "list_sockets")?;
        list.load("tcp", &kernel_btf)
            .map_err(|error| refused("the program that lists sockets")(&error))?;

        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        Ok(Self {
            events: events(&mut ebpf)?,
            listeners: ring(&mut ebpf, "LISTENERS")?,
            hellos: ring(&mut ebpf, "HELLOS")?,
            log: match log {
                KernelLog::Off => None,
                _ => Some(logger(&mut ebpf)?),
            },
            lost: take(&mut ebpf, "LOST")
                .and_then(|map| PerCpuArray::try_from(map).map_err(|error| refused("a map")(&error)))?,
            counted_lost: [0; LOST_COUNTERS as usize],
            counted_misses: 0,
            hellos_begun: Hellos::default(),
            subflows: Subflows::default(),
            counted_given_up: 0,
            cut_off: 0,
            malformed: 0,
            unsaid: BTreeMap::new(),
            hook: options.classify.then(|| Hook::find(options.cgroup_root.as_deref())),
            reading: None,
            own: Vec::new(),
            port: options.port,
            began: Instant::now(),
            looks: every(LOOK),
            ticks: every(CHECK),
            tick: 0,
            resync: true,
            confirm: false,
            listener_moved: false,
            ebpf,
        })
    }

    /// Makes the next observation a complete list.
    pub fn resync(&mut self) {
        self.resync = true;
    }

    /// Lists once more soon.
    pub fn confirm(&mut self) {
        self.confirm = true;
    }

    /// Where ClientHellos are read, or why they are not; `None` when they are not to be, or nobody has looked yet.
    pub fn reading(&self) -> Option<&Result<String, String>> {
        self.reading.as_ref()
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
                ready = self.listeners.readable() => ready.map_err(ring_failed)?.clear_ready(),
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

    /// The complete list for the truth, and what happened before and while it was made.
    fn complete(&mut self) -> Result<Vec<Observation>, EbpfError> {
        let mut observations = self.drain();
        let (sockets, listener) = self.sockets(true)?;
        // What the list puts right is a repair then, also of what was lost while it was made; that is asked for once more.
        observations.extend(self.overwritten());
        let live: HashSet<ConnectionId> = sockets.iter().map(|socket| socket.id).collect();
        self.hellos_begun.keep(&live);
        observations.extend(self.place_hook());
        observations.extend(self.own_addresses());
        let offered = self.hellos_begun.listed(&sockets, self.now());
        observations.push(Observation::Resync { sockets, listener });
        observations.extend(classified(offered));
        // What happened meanwhile comes after the list, where an open that is known and a close that is done change
        // nothing. What happened before came before it: an open whose close was lost would stay otherwise.
        observations.extend(self.drain());
        Ok(observations)
    }

    /// The list beside the events, and what happened before and while it was made.
    fn listed(&mut self) -> Result<Vec<Observation>, EbpfError> {
        let mut observations = self.drain();
        let (sockets, listener) = self.sockets(false)?;
        observations.extend(self.overwritten());
        // What failed once is tried again: a cgroup goes, or another program leaves it.
        if matches!(self.reading, Some(Err(_))) {
            observations.extend(self.place_hook());
        }
        observations.extend(self.own_addresses());
        let offered = self.hellos_begun.listed(&sockets, self.now());
        observations.push(Observation::Listed { sockets, listener });
        observations.extend(classified(offered));
        observations.extend(self.drain());
        Ok(observations)
    }

    /// The connections, as the list has them; with `complete` it is the truth of which subflows there are.
    fn sockets(&mut self, complete: bool) -> Result<(Vec<Socket>, Option<ConnectionId>), EbpfError> {
        let (established, listening): (Vec<_>, Vec<_>) =
            self.list()?.into_iter().partition(|record| record.state == ESTABLISHED);
        let listener = listening.iter().map(|record| ConnectionId(record.cookie)).max();
        let connections = self
            .subflows
            .listed(established.iter().map(subflow).collect(), complete);
        Ok((connections, listener))
    }

    /// The node's addresses, when they are others than before.
    fn own_addresses(&mut self) -> Option<Observation> {
        super::changed_addresses(&mut self.own, addresses::own())
    }

    /// Attaches the program that reads ClientHellos where the listening sockets are; what is to be told of that.
    fn place_hook(&mut self) -> Option<Observation> {
        let hook = self.hook.as_mut()?;
        let listeners = sockdiag::listeners(self.port).unwrap_or_default();
        let hello: Result<&mut CgroupSkb, _> = program(&mut self.ebpf, "client_hello");
        let reading = hello
            .map_err(|error| error.to_string())
            .and_then(|hello| hello.fd().map_err(|error| error.to_string()))
            .and_then(|descriptor| hook.follow(descriptor.as_fd(), &listeners));
        if self.reading.as_ref() == Some(&reading) {
            return None;
        }
        match &reading {
            Ok(place) => tracing::info!("ClientHellos are read at {place}"),
            Err(why) => tracing::warn!(
                "which connections speak HTTP/2 is not seen, and nothing is done until a shim says: {why}"
            ),
        }
        let why = reading.as_ref().err().map(|why| Arc::from(why.as_str()));
        self.reading = Some(reading);
        Some(Observation::Blind(why))
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
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

    /// Looks at the loss counters, and now and then at the complete list.
    fn check(&mut self) -> Result<Vec<Observation>, EbpfError> {
        self.tick += 1;
        self.hellos_begun.expire(self.now());
        let mut newly = [0; LOST_COUNTERS as usize];
        for name in 0..LOST_COUNTERS {
            let total: u64 = self
                .lost
                .get(&name, 0)
                .map_err(|error| refused("to read a counter")(&error))?
                .iter()
                .sum();
            newly[name as usize] = total - mem::replace(&mut self.counted_lost[name as usize], total);
        }
        let given_up = self.hellos_begun.given_up();
        let given_up = given_up - mem::replace(&mut self.counted_given_up, given_up);
        let lost = [
            (HelloLoss::Ring, newly[LOST_HELLOS as usize]),
            (HelloLoss::Storage, newly[LOST_STORAGE as usize]),
            (HelloLoss::Pieces, mem::take(&mut self.cut_off)),
            (HelloLoss::Unfinished, given_up),
            (HelloLoss::Malformed, mem::take(&mut self.malformed)),
        ];
        let mut observations = Vec::new();
        for (how, count) in lost.into_iter().filter(|(_, count)| *count > 0) {
            *self.unsaid.entry(how).or_default() += count;
            observations.push(Observation::HellosLost { how, count });
        }
        self.say_lost();
        let misses = self.misses();
        let missed = misses.saturating_sub(mem::replace(&mut self.counted_misses, misses));
        observations.extend(self.overwritten());
        // Any socket of the machine may have been what they were run for: a list beside the events says whether it was one of
        // ours, and the next one repairs what it was.
        self.confirm |= missed > 0;
        let events = newly[LOST_EVENTS as usize];
        if events > 0 {
            tracing::warn!(
                events,
                "there was no room for socket events: asking for the complete list"
            );
            observations.push(Observation::Lost { events });
        }
        if observations.iter().any(|told| matches!(told, Observation::Lost { .. })) {
            return Ok(observations);
        }
        if mem::take(&mut self.listener_moved) {
            observations.extend(self.complete()?);
        } else if mem::take(&mut self.confirm) || self.tick.is_multiple_of(LIST_EVERY) {
            observations.extend(self.listed()?);
        }
        Ok(observations)
    }

    /// The events that were overwritten before they were read.
    fn overwritten(&mut self) -> Option<Observation> {
        let events = self.events.lost();
        if events == 0 {
            return None;
        }
        tracing::warn!(events, "socket events were overwritten: asking for the complete list");
        Some(Observation::Lost { events })
    }

    /// Says which hellos were lost, at most one line in a while: strangers can cause it.
    fn say_lost(&mut self) {
        if self.unsaid.is_empty() || !self.tick.is_multiple_of(SAY_EVERY) {
            return;
        }
        let lost: Vec<String> = mem::take(&mut self.unsaid)
            .into_iter()
            .map(|(how, count)| format!("{} {count}", how.name()))
            .collect();
        tracing::warn!(
            lost = lost.join(", "),
            "ClientHellos were lost: these connections stay unknown until a shim names their protocol"
        );
    }

    /// Runs of the program that counts which the kernel left out, because an event happened while another was told on the
    /// same processor (`recursion_misses`, kernel/bpf/syscall.c); 0 where it does not tell.
    fn misses(&mut self) -> u64 {
        let state: Result<&mut BtfTracePoint, _> = program(&mut self.ebpf, "socket_state");
        let Some(descriptor) = state
            .ok()
            .and_then(|state| state.fd().ok().map(|fd| fd.as_fd().as_raw_fd()))
        else {
            return 0;
        };
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap_or_default();
        text.lines()
            .find_map(|line| line.strip_prefix("recursion_misses:"))
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Takes all that there is.
    fn drain(&mut self) -> Vec<Observation> {
        let now = self.now();
        // The events are taken first and told last: what a connection said before it opened, or before it closed, is in
        // the ring by then.
        let mut events = Vec::new();
        while let Some(event) = self.events.next() {
            events.push(event);
        }
        let mut observations = Vec::new();
        while let Some(item) = self.hellos.get_mut().next() {
            let Some(hello) = hello(&item) else {
                self.malformed += 1;
                continue;
            };
            if hello.id.0 == 0 {
                let local = SocketAddr::new(hello.local, self.port);
                let ends = (local, hello.remote, hello.start);
                self.hellos_begun
                    .before_connection(ends, hello.offset, hello.payload, now);
            } else if hello.payload.is_empty() {
                self.cut_off += u64::from(self.hellos_begun.cut_off(hello.id));
            } else if let Some(protocol) = self.hellos_begun.piece(hello.id, hello.offset, hello.payload, now) {
                observations.push(Observation::Classified { id: hello.id, protocol });
            }
        }
        for event in events {
            match event.kind {
                KIND_OPENED | KIND_JOINED => {
                    // One more subflow of a client that is there is none of its own.
                    let Some(socket) = self.subflows.opened(opened(&event, self.port)) else {
                        continue;
                    };
                    let offered = self.hellos_begun.opened(&socket, now);
                    let id = socket.id;
                    observations.push(Observation::Opened(socket));
                    observations.extend(offered.map(|protocol| Observation::Classified { id, protocol }));
                }
                KIND_CLOSED => {
                    let id = ConnectionId(event.cookie);
                    self.hellos_begun.closed(id);
                    let [bytes_in, bytes_out, ..] = event.told;
                    let ended = self.subflows.closed(id).map(|id| Observation::Closed {
                        id,
                        bytes_in,
                        bytes_out,
                    });
                    observations.extend(ended);
                }
                _ => self.malformed += 1,
            }
        }
        while self.listeners.get_mut().next().is_some() {
            // The state changes a moment before the socket can be listed: the list is taken now and once more.
            self.resync = true;
            self.listener_moved = true;
        }
        observations
    }
}

fn classified(offered: Vec<(ConnectionId, Protocol)>) -> impl Iterator<Item = Observation> {
    let classified = |(id, protocol)| Observation::Classified { id, protocol };
    offered.into_iter().map(classified)
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

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, EbpfError> {
    ebpf.take_map(name).ok_or_else(|| EbpfError::Refused {
        what: "a map",
        why: format!("the object has no map {name}"),
    })
}

fn events(ebpf: &mut Ebpf) -> Result<Events, EbpfError> {
    let mut array = |name| match take(ebpf, name)? {
        Map::Array(data) => Ok(data),
        _ => Err(EbpfError::Refused {
            what: "a map",
            why: format!("the object's map {name} is no array"),
        }),
    };
    let (turns, places) = (array("TURNS")?, array("EVENTS")?);
    Events::of(turns.fd().as_fd(), places.fd().as_fd()).map_err(|source| EbpfError::Io {
        what: "the memory of events",
        source,
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
