//! Models of layer-4 load balancers: where a new connection lands.
//!
//! Input: what the balancer can see of the apiservers, and who connects. Output: an apiserver.
//! Must never look at what a real balancer of that kind cannot see.

use std::{fmt, str::FromStr};

use crate::random::{Random, mix};

/// How a load balancer chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancer {
    /// Each new connection anywhere: iptables, or a hash over both ports.
    Random,
    /// In turn.
    RoundRobin,
    /// In turn, a balancer for each of so many regions: clients of one land there only. Apiserver `i` is in region `i` modulo
    /// their number, and so is who has not been anywhere yet.
    RoundRobinRegions(usize),
    /// The fewest connections that are not draining: what a balancer that closes a drained connection's socket sees.
    Leastconn,
    /// The fewest sockets, draining ones included: what HAProxy and nginx really see.
    LeastconnSockets,
    /// So many balancers side by side, each counting its own sockets only.
    LeastconnInstances(usize),
    /// The better of two chosen at random.
    PowerOfTwo,
    /// A client comes straight back to where it was while that is up: a stick table, or the nearest apiserver.
    Affinity,
    /// Maglev's consistent hashing over address and port (Eisenbud and others, NSDI 2016).
    Maglev,
}

/// What is seen of one apiserver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backend {
    /// Whether its health check passes.
    pub up: bool,
    /// Connections that are not draining.
    pub active: usize,
    /// Sockets.
    pub sockets: usize,
    /// Its weight while it starts slowly, from above 0 to 1.
    pub weight: f64,
}

impl Backend {
    /// What a balancer that counts takes its connections for: each weighs more while it starts slowly.
    fn weighed(&self, count: usize) -> f64 {
        if self.weight < 1.0 {
            (count as f64 + 1.0) / self.weight.max(1e-3)
        } else {
            count as f64
        }
    }
}

/// A balancer with its memory.
#[derive(Clone, Debug)]
pub struct Balancer {
    kind: LoadBalancer,
    turn: usize,
    /// The same by region.
    turns: Vec<usize>,
    random: Random,
    /// Sockets by instance and apiserver.
    own: Vec<Vec<usize>>,
    maglev: Vec<usize>,
    maglev_of: Vec<bool>,
}

/// Entries of the Maglev table: a prime, a hundred times the apiservers there may be.
const MAGLEV: usize = 6_553;

impl Balancer {
    /// A balancer that has seen nothing.
    pub fn new(kind: LoadBalancer, random: Random) -> Self {
        Self {
            kind,
            turn: 0,
            turns: Vec::new(),
            random,
            own: Vec::new(),
            maglev: Vec::new(),
            maglev_of: Vec::new(),
        }
    }

    /// Another kind from now on; sockets that are open stay counted.
    pub fn become_kind(&mut self, kind: LoadBalancer) {
        self.kind = kind;
    }

    /// Where the next connection of `client` lands, who was at `last` before; `None` when no apiserver is up.
    pub fn pick(&mut self, client: usize, last: Option<usize>, port: u64, backends: &[Backend]) -> Option<usize> {
        let mut up: Vec<usize> = (0..backends.len()).filter(|index| backends[*index].up).collect();
        if up.is_empty() {
            return None;
        }
        // One that starts slowly is passed over by those that do not count, in proportion.
        let is_counting = matches!(
            self.kind,
            LoadBalancer::Leastconn | LoadBalancer::LeastconnSockets | LoadBalancer::LeastconnInstances(_)
        );
        if !is_counting && self.kind != LoadBalancer::Affinity && up.iter().any(|index| backends[*index].weight < 1.0) {
            let full: Vec<usize> = up
                .iter()
                .copied()
                .filter(|index| backends[*index].weight >= 1.0 || self.random.chance(backends[*index].weight))
                .collect();
            if !full.is_empty() {
                up = full;
            }
        }
        let any = |random: &mut Random| up[random.below(up.len())];
        Some(match self.kind {
            LoadBalancer::Random => any(&mut self.random),
            LoadBalancer::RoundRobin => {
                self.turn += 1;
                up[self.turn % up.len()]
            }
            LoadBalancer::RoundRobinRegions(regions) => {
                let region = last.unwrap_or(client) % regions;
                let there: Vec<usize> = up.iter().copied().filter(|index| index % regions == region).collect();
                self.turns.resize(regions.max(self.turns.len()), 0);
                self.turns[region] += 1;
                return (!there.is_empty()).then(|| there[self.turns[region] % there.len()]);
            }
            LoadBalancer::Leastconn => self.least(&up, |index| backends[index].weighed(backends[index].active)),
            LoadBalancer::LeastconnSockets => self.least(&up, |index| backends[index].weighed(backends[index].sockets)),
            LoadBalancer::LeastconnInstances(instances) => {
                let instance = self.instance(client, instances, backends.len());
                let own = std::mem::take(&mut self.own);
                let chosen = self.least(&up, |index| backends[index].weighed(own[instance][index]));
                self.own = own;
                chosen
            }
            LoadBalancer::PowerOfTwo => {
                let (one, other) = (any(&mut self.random), any(&mut self.random));
                if backends[other].active < backends[one].active {
                    other
                } else {
                    one
                }
            }
            LoadBalancer::Affinity => {
                let mut at = last.unwrap_or(mix(client as u64) as usize) % backends.len();
                while !backends[at].up {
                    at = (at + 1) % backends.len();
                }
                at
            }
            LoadBalancer::Maglev => {
                let of: Vec<bool> = (0..backends.len()).map(|index| up.contains(&index)).collect();
                if self.maglev_of != of {
                    self.maglev = maglev_table(&of);
                    self.maglev_of = of;
                }
                self.maglev[mix(mix(client as u64) ^ port) as usize % MAGLEV]
            }
        })
    }

    /// Notes a socket that was opened or closed.
    pub fn note(&mut self, client: usize, server: usize, servers: usize, opened: bool) {
        if let LoadBalancer::LeastconnInstances(instances) = self.kind {
            let instance = self.instance(client, instances, servers);
            let count = &mut self.own[instance][server];
            *count = if opened { *count + 1 } else { count.saturating_sub(1) };
        }
    }

    /// The fewest; among equals any.
    fn least(&mut self, up: &[usize], count: impl Fn(usize) -> f64) -> usize {
        let fewest = up.iter().map(|index| count(*index)).fold(f64::INFINITY, f64::min);
        let equals: Vec<usize> = up.iter().copied().filter(|index| count(*index) == fewest).collect();
        equals[self.random.below(equals.len())]
    }

    fn instance(&mut self, client: usize, instances: usize, servers: usize) -> usize {
        self.own.resize(instances.max(self.own.len()), Vec::new());
        for own in &mut self.own {
            own.resize(servers.max(own.len()), 0);
        }
        mix(client as u64 ^ 0xb10c) as usize % instances.max(1)
    }
}

/// Section 3.4 of the Maglev paper: each takes its next free preferred entry in turn.
fn maglev_table(up: &[bool]) -> Vec<usize> {
    let mut table = vec![usize::MAX; MAGLEV];
    let mut next = vec![0_usize; up.len()];
    let mut filled = 0;
    while filled < MAGLEV {
        for server in (0..up.len()).filter(|server| up[*server]) {
            let offset = mix(server as u64) as usize % MAGLEV;
            let skip = mix(server as u64 ^ 0x51) as usize % (MAGLEV - 1) + 1;
            let mut entry = (offset + next[server] * skip) % MAGLEV;
            while table[entry] != usize::MAX {
                next[server] += 1;
                entry = (offset + next[server] * skip) % MAGLEV;
            }
            table[entry] = server;
            next[server] += 1;
            filled += 1;
            if filled == MAGLEV {
                break;
            }
        }
    }
    table
}

/// A name that is no load balancer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no load balancer: choose random, roundrobin, roundrobin-regions, leastconn, leastconn-sockets, leastconn-instances, p2c, affinity or maglev"
)]
pub struct UnknownBalancer(String);

impl FromStr for LoadBalancer {
    type Err = UnknownBalancer;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name {
            "random" => Self::Random,
            "roundrobin" => Self::RoundRobin,
            "roundrobin-regions" => Self::RoundRobinRegions(5),
            "leastconn" => Self::Leastconn,
            "leastconn-sockets" => Self::LeastconnSockets,
            "leastconn-instances" => Self::LeastconnInstances(3),
            "p2c" => Self::PowerOfTwo,
            "affinity" => Self::Affinity,
            "maglev" => Self::Maglev,
            _ => return Err(UnknownBalancer(name.to_owned())),
        })
    }
}

impl fmt::Display for LoadBalancer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::RoundRobin => "roundrobin",
            Self::RoundRobinRegions(_) => "roundrobin-regions",
            Self::Leastconn => "leastconn",
            Self::LeastconnSockets => "leastconn-sockets",
            Self::LeastconnInstances(_) => "leastconn-instances",
            Self::PowerOfTwo => "p2c",
            Self::Affinity => "affinity",
            Self::Maglev => "maglev",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(active: &[usize]) -> Vec<Backend> {
        let backend = |active: &usize| Backend {
            up: true,
            active: *active,
            sockets: *active,
            weight: 1.0,
        };
        active.iter().map(backend).collect()
    }

    fn landings(kind: LoadBalancer, seen: &[Backend], count: usize) -> Vec<usize> {
        let mut balancer = Balancer::new(kind, Random::new(1, 1));
        let mut landed = vec![0; seen.len()];
        for client in 0..count {
            landed[balancer.pick(client, None, client as u64, seen).expect("one is up")] += 1;
        }
        landed
    }

    #[test]
    fn the_share_of_the_emptiest_is_what_the_maths_assumes() {
        let seen = backends(&[500, 500, 0]);
        for (kind, share) in [
            (LoadBalancer::Random, 1.0 / 3.0),
            (LoadBalancer::RoundRobin, 1.0 / 3.0),
            (LoadBalancer::Leastconn, 1.0),
            (LoadBalancer::PowerOfTwo, 5.0 / 9.0),
            (LoadBalancer::Maglev, 1.0 / 3.0),
        ] {
            let landed = landings(kind, &seen, 9_000)[2] as f64 / 9_000.0;
            assert!((landed - share).abs() < 0.02, "{kind}: {landed}, expected {share}");
        }
    }

    #[test]
    fn nobody_lands_on_one_that_is_down() {
        let mut seen = backends(&[5, 5, 0]);
        seen[2].up = false;
        for kind in [
            LoadBalancer::Random,
            LoadBalancer::RoundRobin,
            LoadBalancer::Leastconn,
            LoadBalancer::LeastconnSockets,
            LoadBalancer::LeastconnInstances(3),
            LoadBalancer::PowerOfTwo,
            LoadBalancer::Affinity,
            LoadBalancer::Maglev,
        ] {
            assert_eq!(landings(kind, &seen, 300)[2], 0, "{kind}");
            assert_eq!(
                kind.to_string().parse::<LoadBalancer>().map(|k| k.to_string()),
                Ok(kind.to_string())
            );
        }
        seen.iter_mut().for_each(|backend| backend.up = false);
        assert_eq!(
            Balancer::new(LoadBalancer::Random, Random::new(1, 1)).pick(0, None, 0, &seen),
            None
        );
    }

    #[test]
    fn a_region_s_balancer_sends_its_clients_to_its_own_apiservers_in_turn() {
        let mut seen = backends(&[0; 6]);
        seen[2].up = false;
        let mut balancer = Balancer::new(LoadBalancer::RoundRobinRegions(2), Random::new(1, 1));
        let mut picks = |last| -> Vec<_> { (0..4).map(|_| balancer.pick(9, last, 1, &seen)).collect() };
        assert_eq!(picks(Some(2)), [Some(4), Some(0), Some(4), Some(0)]);
        assert_eq!(
            picks(None),
            [Some(3), Some(5), Some(1), Some(3)],
            "who has been nowhere has a region too"
        );
    }

    #[test]
    fn affinity_brings_a_client_back() {
        let seen = backends(&[0, 0, 0]);
        let mut balancer = Balancer::new(LoadBalancer::Affinity, Random::new(1, 1));
        for client in 0..50 {
            assert_eq!(
                balancer.pick(client, None, 1, &seen),
                balancer.pick(client, None, 2, &seen)
            );
            assert_eq!(balancer.pick(client, Some(client % 3), 1, &seen), Some(client % 3));
        }
    }
}
