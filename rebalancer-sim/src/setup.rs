//! What is simulated: apiservers, clients, a load balancer, incidents, and who tries to keep the balance.
//!
//! Input and output: none; these are values that the caller fills in.
//! Must never hold anything random: a setup and a seed together are one run.

use std::{fmt, time::Duration};

use rebalancer_core::policy::Policy;

use crate::{balancer::LoadBalancer, clock::pace, random::Random};

/// How a figure differs from client to client.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spread {
    /// Everyone the same.
    Constant(f64),
    /// A few carry most of it: a lognormal of that median and sigma.
    Lognormal {
        /// Half of them are below.
        median: f64,
        /// Deviation of the logarithm.
        sigma: f64,
    },
}

impl Spread {
    /// One client's figure.
    pub fn draw(self, random: &mut Random) -> f64 {
        match self {
            Self::Constant(value) => value,
            Self::Lognormal { median, sigma } => median * (sigma * random.normal()).exp(),
        }
    }
}

/// Clients of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Its user agent, and the beginning of its users' names.
    pub name: String,
    /// How many.
    pub count: usize,
    /// Requests a second of each.
    pub requests: Spread,
    /// Watches that each keeps open.
    pub watches: u32,
    /// Seconds of work that a LIST of everything costs an apiserver, for those that list when they start or when their
    /// connection broke; 0 for the others. A GOAWAY makes nobody list: watches resume by resource version.
    pub list_seconds: f64,
}

impl Group {
    /// Clients with one request a second and nothing else.
    pub fn plain(count: usize) -> Self {
        Self {
            name: "client".to_owned(),
            count,
            requests: Spread::Constant(1.0),
            watches: 0,
            list_seconds: 0.0,
        }
    }

    /// Kubelets: a lease every 10 s, status now and then, a score of watches.
    pub fn kubelets(count: usize) -> Self {
        Self {
            name: "kubelet".to_owned(),
            count,
            requests: Spread::Constant(0.3),
            watches: 20,
            list_seconds: 0.05,
        }
    }
}

/// Where the clients are at the start.
#[derive(Clone, Debug, PartialEq)]
pub enum Placement {
    /// So many on each apiserver.
    Counts(Vec<usize>),
    /// Wherever the load balancer puts them.
    Balanced,
}

/// Something that happens to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Incident {
    /// An apiserver dies: its connections break.
    Crash(usize),
    /// An apiserver (re)starts and is ready.
    Start(usize),
    /// The set of apiservers is another one: those below `Setup::apiservers` that are named. Agents are restarted for it.
    Members(Vec<usize>),
    /// New clients come.
    Arrive(Group),
    /// So many clients of those that list lose their connections at once, come back and LIST.
    ListFlood(usize),
    /// Another load balancer from now on.
    Balancer(LoadBalancer),
    /// This share of the snapshots between agents is lost.
    SnapshotLoss(f64),
    /// Snapshots take that long.
    SnapshotDelay(Duration),
    /// Snapshots take as long as this says from region to region; apiserver `i` is in region `i` modulo their number.
    RegionDelays(Vec<Vec<Duration>>),
    /// The agents of these apiservers and those of the others do not hear each other; empty heals it.
    Partition(Vec<usize>),
    /// An apiserver that is down begins with the next release.
    Install(usize),
    /// The agent of one apiserver ends and is started again, with what it wrote down.
    RestartAgent(usize),
    /// The relay of one apiserver hands over to a new one: its connections drain, and the new one does not list them.
    ReplaceRelay(usize),
    /// The clock of one apiserver's node runs fast, or slow where it is below 0, by so many parts of a million from now on.
    Slew(usize, i32),
    /// The agent of one apiserver stands still (a suspended machine, a clock that jumps): it sees the time pass at once.
    Freeze(usize, Duration),
}

/// How a load balancer takes an apiserver that came back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Admission {
    /// So long after it is up nobody is sent there: health checks must pass first.
    pub lag: Duration,
    /// From then on its weight grows to the full one in that time.
    pub slow_start: Duration,
}

/// Connections that are no clients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strangers {
    /// Calls a second through the load balancer: kubectl, health checks, CI, jobs.
    pub calls: f64,
    /// So many of them come together, at even intervals, as jobs do at the full minute; one by one they come by chance.
    pub at_once: u32,
    /// The seconds that a call lasts, from and to.
    pub lasts: (f64, f64),
    /// Probes a second on each apiserver from its own node: the kubelet.
    pub probes: f64,
}

impl Default for Strangers {
    fn default() -> Self {
        Self {
            calls: 0.0,
            at_once: 1,
            lasts: (0.05, 3.0),
            probes: 0.0,
        }
    }
}

/// What an agent does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It tells clients to go.
    Active,
    /// `--dry-run`.
    DryRun,
    /// Paused by an operator.
    Paused,
    /// `--shim none`.
    Shimless,
}

/// How long a run goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Horizon {
    /// So long.
    Fixed(Duration),
    /// Until the balance is reached, at most `limit`, and `after` longer.
    Balanced {
        /// When to give up.
        limit: Duration,
        /// How long to go on after the balance.
        after: Duration,
    },
}

/// Who tries to keep the balance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Contender {
    /// The agents of this project, one on each node: the core itself, not a copy.
    Rebalancer,
    /// `kube-apiserver --goaway-chance`: each request is told to go with that probability.
    GoawayChance(f64),
    /// Connections are told to go at that age, give or take 10 %.
    MaxConnectionAge(Duration),
    /// Nobody.
    Nothing,
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rebalancer => f.write_str("rebalancer"),
            Self::GoawayChance(chance) => write!(f, "goaway-chance={chance}"),
            Self::MaxConnectionAge(age) => write!(f, "max-connection-age={}s", age.as_secs()),
            Self::Nothing => f.write_str("nothing"),
        }
    }
}

/// One simulated cluster.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many apiservers there are, those that come later included.
    pub apiservers: usize,
    /// Which of them take part from the start; empty for all.
    pub members: Vec<usize>,
    /// Who connects.
    pub groups: Vec<Group>,
    /// Where they are at the start.
    pub placement: Placement,
    /// How connections are spread.
    pub balancer: LoadBalancer,
    /// What happens, and when.
    pub incidents: Vec<(Duration, Incident)>,
    /// How long.
    pub horizon: Horizon,
    /// How the balancer takes one that came back, or that has nobody at the start.
    pub admission: Admission,
    /// Connections that are no clients.
    pub strangers: Strangers,
    /// What each agent does; those that are not named are active.
    pub roles: Vec<Role>,
    /// How much each node's clock runs fast, or slow, in parts of a million; they show different times then. All are right and
    /// alike where none is named.
    pub clocks: Vec<i32>,
    /// What the agents are told; node and peers are filled in.
    pub policy: Policy,
    /// Clients that restart an hour, as a share of all: churn.
    pub churn_per_hour: f64,
    /// Whether the shim tells users and watches, as the relay does.
    pub identities: bool,
    /// Time between two points of the picture; `None` for no picture.
    pub sample: Option<Duration>,
}

impl Setup {
    /// The smallest: clients with one request a second, placed as counted, until balance and an hour longer.
    pub fn of_loads(loads: &[usize], balancer: LoadBalancer, policy: Policy) -> Self {
        Self {
            apiservers: loads.len(),
            members: Vec::new(),
            groups: vec![Group::plain(loads.iter().sum())],
            placement: Placement::Counts(loads.to_vec()),
            balancer,
            incidents: Vec::new(),
            admission: Admission::default(),
            strangers: Strangers::default(),
            roles: Vec::new(),
            clocks: Vec::new(),
            horizon: Horizon::Balanced {
                limit: Duration::from_secs(7_200),
                after: Duration::from_secs(3_600),
            },
            policy,
            churn_per_hour: 0.0,
            identities: false,
            sample: None,
        }
    }

    /// The paces of the slowest and of the fastest clock that any node ever has.
    pub fn paces(&self) -> (f64, f64) {
        let slewed = self.incidents.iter().filter_map(|(_, one)| match one {
            Incident::Slew(_, ppm) => Some(*ppm),
            _ => None,
        });
        let paces = self.clocks.iter().copied().chain(slewed).map(pace);
        paces.fold((1.0, 1.0), |(slowest, fastest), pace| {
            (pace.min(slowest), pace.max(fastest))
        })
    }
}
