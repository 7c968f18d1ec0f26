//! The built-in scenarios: a cluster, and what happens to it.
//!
//! Input: a name. Output: a setup. Must never depend on anything but the name.

use std::{collections::BTreeSet, time::Duration};

use rebalancer_core::{
    ids::ApiserverName,
    policy::{Policy, Weight},
};

use crate::{
    balancer::LoadBalancer,
    setup::{Admission, Group, Horizon, Incident, Placement, Role, Setup, Spread, Strangers},
};

/// One of the built-in scenarios.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// The cluster.
    pub build: fn() -> Setup,
}

/// All of them.
pub const SCENARIOS: [Scenario; 27] = [
    Scenario {
        name: "restart",
        about: "300 clients; one of three apiservers dies and comes back empty",
        build: restart,
    },
    Scenario {
        name: "rolling-upgrade",
        about: "1,000 kubelets, 24 hours, three apiservers upgraded one after the other",
        build: rolling_upgrade,
    },
    Scenario {
        name: "heavy-tail",
        about: "3,000 clients, lognormal request rates (sigma 1.5), weighed by requests, behind leastconn as HAProxy counts",
        build: heavy_tail,
    },
    Scenario {
        name: "heavy-controller",
        about: "one controller asks more than two apiservers' share: it cannot be placed, and is not moved",
        build: heavy_controller,
    },
    Scenario {
        name: "list-flood",
        about: "a restart behind leastconn; 200 agents break, land on the empty apiserver all at once and LIST everything",
        build: list_flood,
    },
    Scenario {
        name: "scale-out",
        about: "a fourth apiserver joins",
        build: scale_out,
    },
    Scenario {
        name: "scale-in",
        about: "the fourth apiserver leaves",
        build: scale_in,
    },
    Scenario {
        name: "lb-change",
        about: "clients that come straight back, until another load balancer is put in",
        build: lb_change,
    },
    Scenario {
        name: "leastconn-draining",
        about: "a restart behind a leastconn that counts draining sockets, with long watches",
        build: leastconn_draining,
    },
    Scenario {
        name: "lost-snapshots",
        about: "a restart while every second snapshot between agents is lost",
        build: lost_snapshots,
    },
    Scenario {
        name: "late-snapshots",
        about: "a restart while snapshots take 3 s",
        build: late_snapshots,
    },
    Scenario {
        name: "partition",
        about: "one agent is cut off in the middle of a rebalancing, for five minutes",
        build: partition,
    },
    Scenario {
        name: "clock-trouble",
        about: "an agent stands still for a minute in the middle of a rebalancing, then sees the time pass at once",
        build: clock_trouble,
    },
    Scenario {
        name: "slewed-clocks",
        about: "a restart while NTP slews the nodes' clocks, which differ: 500 ppm fast, 500 slow, and 83,333 from its middle on",
        build: slewed_clocks,
    },
    Scenario {
        name: "steady",
        about: "5,000 clients behind a random load balancer, a quarter of them restarts every hour: nothing to do",
        build: steady,
    },
    Scenario {
        name: "late-admission",
        about: "a restart behind a load balancer that admits the apiserver 45 s after it is ready",
        build: late_admission,
    },
    Scenario {
        name: "slow-start",
        about: "a restart behind round robin that admits after 10 s and gives full weight a minute later",
        build: slow_start,
    },
    Scenario {
        name: "slow-start-leastconn",
        about: "the same behind leastconn, which sends as many as the weight has grown for",
        build: slow_start_leastconn,
    },
    Scenario {
        name: "health-checks",
        about: "a restart among two short calls a second through the balancer and a kubelet's probe a second on each apiserver",
        build: health_checks,
    },
    Scenario {
        name: "relay-replaced",
        about: "a restart; in the middle of the rebalancing one relay hands over to another, and all its clients go",
        build: relay_replaced,
    },
    Scenario {
        name: "affinity",
        about: "a restart behind a balancer that brings each client straight back, for six hours",
        build: affinity,
    },
    Scenario {
        name: "agent-restarts",
        about: "a restart; one agent is started anew in the middle of the rebalancing, and another one later",
        build: agent_restarts,
    },
    Scenario {
        name: "canary",
        about: "a restart; one agent acts, one is a dry run, one is paused",
        build: canary,
    },
    Scenario {
        name: "flapping",
        about: "an apiserver that comes and goes four times in six minutes",
        build: flapping,
    },
    Scenario {
        name: "two-apiservers",
        about: "two apiservers behind round robin, 600 clients, half of them restart every hour, for a day",
        build: two_apiservers,
    },
    Scenario {
        name: "uneven",
        about: "1054, 81 and 518 clients: the third becomes a donor on the way",
        build: uneven,
    },
    Scenario {
        name: "uneven-donors",
        about: "908, 672 and 77 clients, by chance: two donors of different size",
        build: uneven_donors,
    },
];

/// The scenario of that name.
pub fn named(name: &str) -> Option<Scenario> {
    SCENARIOS.into_iter().find(|scenario| scenario.name == name)
}

/// The defaults of the agent.
pub fn default_policy() -> Policy {
    Policy::new(ApiserverName::new("any"), BTreeSet::new())
}

fn minutes(count: u64) -> Duration {
    Duration::from_secs(60 * count)
}

fn cluster(groups: Vec<Group>, balancer: LoadBalancer, length: Duration) -> Setup {
    Setup {
        apiservers: 3,
        members: Vec::new(),
        groups,
        placement: Placement::Balanced,
        balancer,
        incidents: Vec::new(),
        admission: Admission::default(),
        strangers: Strangers::default(),
        roles: Vec::new(),
        clocks: Vec::new(),
        horizon: Horizon::Fixed(length),
        policy: default_policy(),
        churn_per_hour: 0.0,
        identities: true,
        sample: None,
    }
}

fn agents(count: usize) -> Group {
    Group {
        name: "agent".to_owned(),
        count,
        requests: Spread::Constant(1.0),
        watches: 3,
        list_seconds: 0.0,
    }
}

fn dies_and_returns(server: usize, at: u64, seconds: u64) -> [(Duration, Incident); 2] {
    [
        (Duration::from_secs(at), Incident::Crash(server)),
        (Duration::from_secs(at + seconds), Incident::Start(server)),
    ]
}

fn restart() -> Setup {
    Setup {
        incidents: dies_and_returns(2, 60, 30).to_vec(),
        ..cluster(vec![agents(300)], LoadBalancer::RoundRobin, minutes(20))
    }
}

fn rolling_upgrade() -> Setup {
    let hour = 3_600;
    let upgrades = (0..3).flat_map(|server| {
        let at = hour + 300 * server as u64;
        let [crash, start] = dies_and_returns(server, at, 60);
        [crash, (Duration::from_secs(at + 30), Incident::Install(server)), start]
    });
    Setup {
        incidents: upgrades.collect(),
        ..cluster(vec![Group::kubelets(1_000)], LoadBalancer::Random, minutes(24 * 60))
    }
}

fn heavy_tail() -> Setup {
    let clients = Group {
        requests: Spread::Lognormal {
            median: 0.5,
            sigma: 1.5,
        },
        ..agents(3_000)
    };
    let mut policy = default_policy();
    policy.weight = Weight::Requests;
    policy.skew_target = 0.05;
    // The draw decides how uneven it is: whatever is above the target is to be moved.
    policy.skew_threshold = 0.055;
    Setup {
        policy,
        // One that does not count draining sockets sends whoever leaves the emptiest straight back to it.
        ..cluster(vec![clients], LoadBalancer::LeastconnSockets, minutes(60))
    }
}

fn heavy_controller() -> Setup {
    let controller = Group {
        name: "controller".to_owned(),
        count: 1,
        requests: Spread::Constant(800.0),
        watches: 30,
        list_seconds: 0.0,
    };
    let mut policy = default_policy();
    policy.weight = Weight::Requests;
    Setup {
        policy,
        incidents: vec![(minutes(5), Incident::Arrive(controller))],
        ..cluster(vec![agents(600)], LoadBalancer::Leastconn, minutes(60))
    }
}

fn list_flood() -> Setup {
    let listers = Group {
        name: "lister".to_owned(),
        count: 200,
        requests: Spread::Constant(0.5),
        watches: 10,
        list_seconds: 2.0,
    };
    let mut incidents = dies_and_returns(2, 300, 60).to_vec();
    // A moment after the apiserver is back, and before its clients are.
    incidents.push((Duration::from_secs(368), Incident::ListFlood(200)));
    Setup {
        incidents,
        ..cluster(
            vec![Group::kubelets(1_000), listers],
            LoadBalancer::LeastconnSockets,
            minutes(60),
        )
    }
}

fn scale_out() -> Setup {
    Setup {
        apiservers: 4,
        members: vec![0, 1, 2],
        incidents: vec![(minutes(5), Incident::Members(vec![0, 1, 2, 3]))],
        ..cluster(vec![agents(1_200)], LoadBalancer::Random, minutes(40))
    }
}

fn scale_in() -> Setup {
    Setup {
        apiservers: 4,
        incidents: vec![(minutes(5), Incident::Members(vec![0, 1, 2]))],
        ..cluster(vec![agents(1_200)], LoadBalancer::Random, minutes(40))
    }
}

fn lb_change() -> Setup {
    let mut incidents = dies_and_returns(2, 60, 30).to_vec();
    incidents.push((minutes(60), Incident::Balancer(LoadBalancer::RoundRobin)));
    Setup {
        incidents,
        churn_per_hour: 0.2,
        ..cluster(vec![agents(900)], LoadBalancer::Affinity, minutes(240))
    }
}

fn leastconn_draining() -> Setup {
    Setup {
        incidents: dies_and_returns(2, 60, 30).to_vec(),
        ..cluster(vec![agents(900)], LoadBalancer::LeastconnSockets, minutes(40))
    }
}

fn lost_snapshots() -> Setup {
    let mut setup = restart();
    setup.incidents.insert(0, (Duration::ZERO, Incident::SnapshotLoss(0.5)));
    setup
}

fn late_snapshots() -> Setup {
    let mut setup = restart();
    setup
        .incidents
        .insert(0, (Duration::ZERO, Incident::SnapshotDelay(Duration::from_secs(3))));
    setup
}

fn partition() -> Setup {
    let mut setup = cluster(vec![agents(900)], LoadBalancer::RoundRobin, minutes(30));
    setup.incidents = dies_and_returns(2, 60, 30).to_vec();
    setup
        .incidents
        .push((Duration::from_secs(110), Incident::Partition(vec![0])));
    setup
        .incidents
        .push((Duration::from_secs(410), Incident::Partition(Vec::new())));
    setup
}

fn clock_trouble() -> Setup {
    let mut setup = cluster(vec![agents(900)], LoadBalancer::RoundRobin, minutes(30));
    setup.incidents = dies_and_returns(2, 60, 30).to_vec();
    setup
        .incidents
        .push((Duration::from_secs(110), Incident::Freeze(0, minutes(1))));
    setup
}

fn slewed_clocks() -> Setup {
    let mut setup = restart();
    setup.clocks = vec![500, -500, 0];
    for (server, ppm) in [(0, 83_333), (1, -83_333)] {
        setup
            .incidents
            .push((Duration::from_secs(104), Incident::Slew(server, ppm)));
    }
    setup
}

fn steady() -> Setup {
    Setup {
        churn_per_hour: 0.25,
        ..cluster(vec![agents(5_000)], LoadBalancer::Random, minutes(180))
    }
}

fn late_admission() -> Setup {
    let mut setup = restart();
    setup.admission.lag = Duration::from_secs(45);
    setup
}

fn slow_start() -> Setup {
    let mut setup = restart();
    setup.admission = Admission {
        lag: Duration::from_secs(10),
        slow_start: minutes(1),
    };
    setup
}

fn slow_start_leastconn() -> Setup {
    Setup {
        balancer: LoadBalancer::Leastconn,
        ..slow_start()
    }
}

fn health_checks() -> Setup {
    Setup {
        strangers: Strangers {
            calls: 2.0,
            probes: 1.1,
            ..Strangers::default()
        },
        ..restart()
    }
}

fn relay_replaced() -> Setup {
    let mut setup = restart();
    setup
        .incidents
        .push((Duration::from_secs(104), Incident::ReplaceRelay(0)));
    setup
}

fn affinity() -> Setup {
    Setup {
        incidents: dies_and_returns(2, 60, 30).to_vec(),
        ..cluster(vec![agents(1_000)], LoadBalancer::Affinity, minutes(6 * 60))
    }
}

fn agent_restarts() -> Setup {
    let mut setup = restart();
    for (at, server) in [(104, 0), (112, 1)] {
        setup
            .incidents
            .push((Duration::from_secs(at), Incident::RestartAgent(server)));
    }
    setup
}

fn canary() -> Setup {
    let mut setup = cluster(vec![agents(900)], LoadBalancer::Leastconn, minutes(20));
    setup.placement = Placement::Counts(vec![600, 300, 0]);
    setup.roles = vec![Role::Active, Role::DryRun, Role::Paused];
    setup
}

fn flapping() -> Setup {
    let mut setup = cluster(vec![agents(300)], LoadBalancer::Leastconn, minutes(20));
    for turn in 0..4 {
        setup.incidents.extend(dies_and_returns(2, 60 + 90 * turn, 25));
    }
    setup
}

fn two_apiservers() -> Setup {
    let mut setup = cluster(vec![agents(600)], LoadBalancer::RoundRobin, minutes(24 * 60));
    setup.apiservers = 2;
    setup.churn_per_hour = 0.5;
    setup
}

fn uneven_donors() -> Setup {
    Setup {
        placement: Placement::Counts(vec![908, 672, 77]),
        ..cluster(vec![agents(1_657)], LoadBalancer::Random, minutes(20))
    }
}

fn uneven() -> Setup {
    Setup {
        placement: Placement::Counts(vec![1_054, 81, 518]),
        ..cluster(vec![agents(1_653)], LoadBalancer::RoundRobin, minutes(20))
    }
}
