//! One run: apiservers, clients, a load balancer and a contender in virtual time.
//!
//! Input: a [`Setup`], a [`Contender`], a seed. Output: a [`Run`], the same every time.
//! Must never run another planner than the agent's: each apiserver has an agent of the core (`agents.rs`), fed as by a
//! source and a relay, and asked by its peers.
//!
//! What is modelled, and where it comes from: client-go ends each watch after 5 to 10 minutes (evenly) and opens it anew;
//! after a GOAWAY the next request, or the next watch that ends, goes over a new connection, and the old one stays open
//! until its last watch has ended; a broken connection is tried again with a back-off that doubles from 0.8 to 30 s.

use std::time::Duration;

use rebalancer_core::policy::Weight;

use crate::{
    balancer::{Backend, Balancer},
    clock::Clock,
    figures::{Mark, Run},
    node::{Connection, Identity, Life, Node, STRANGER},
    queue::{Event, Queue},
    random::Random,
    setup::{Admission, Contender, Group, Horizon, Placement, Setup},
};

/// The start on the run's clock, in milliseconds: connections may be older than the run.
pub(crate) const START: u64 = 7_200_000;

/// Clocks that are not alike are so far apart, in milliseconds.
const APART: u64 = 1_000_003;

/// Seconds of work that a watch costs when it starts: it takes a seat until its first events are sent.
const WATCH_START: f64 = 0.005;

/// client-go's watches last that long, in milliseconds.
const WATCH_LIFE: (f64, f64) = (300_000.0, 600_000.0);

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) group: usize,
    pub(crate) requests: f64,
    pub(crate) home: Option<usize>,
    /// Where it counts: where it is, or where it was until it has landed.
    counted: Option<usize>,
    /// Where it was last.
    last: Option<usize>,
    /// Watches that old connections still hold.
    elsewhere: u32,
    /// Which planned connect is the one that counts.
    attempt: u32,
    tries: u32,
    /// Whether it must list when it connects.
    pub(crate) relist: bool,
}

/// The state of one run.
pub(crate) struct World<'a> {
    pub(crate) setup: &'a Setup,
    pub(crate) contender: Contender,
    pub(crate) now: u64,
    queue: Queue,
    pub(crate) nodes: Vec<Node>,
    pub(crate) groups: Vec<Group>,
    pub(crate) clients: Vec<Client>,
    pub(crate) identities: Vec<Identity>,
    pub(crate) connections: Vec<Connection>,
    pub(crate) balancer: Balancer,
    pub(crate) random: Random,
    pub(crate) loads: Vec<f64>,
    /// Clients that count nowhere: they are new, or their connection broke.
    pub(crate) uncounted: usize,
    pub(crate) balanced_at: Option<u64>,
    pub(crate) since: u64,
    pub(crate) goaways_before: u64,
    pub(crate) skew_at: u64,
    pub(crate) skew: f64,
    pub(crate) skew_area: f64,
    /// On which side of the mean each apiserver was last, further away than the threshold.
    pub(crate) sides: Vec<Option<bool>>,
    pub(crate) loss: f64,
    /// How long snapshots take, in milliseconds, from region to region.
    pub(crate) delays: Vec<Vec<u64>>,
    pub(crate) partition: Vec<usize>,
    pub(crate) instances: u64,
    pub(crate) run: Run,
}

/// Runs one setup.
pub fn simulate(setup: &Setup, contender: Contender, seed: u64) -> Run {
    let mut world = World::new(setup, contender, seed);
    world.begin();
    world.finish()
}

/// A wait in milliseconds; what never happens is beyond any horizon.
pub(crate) fn millis(seconds: f64) -> u64 {
    if seconds.is_finite() {
        (seconds * 1000.0).ceil() as u64
    } else {
        u64::MAX / 4
    }
}

impl<'a> World<'a> {
    fn new(setup: &'a Setup, contender: Contender, seed: u64) -> Self {
        let node = |index: usize| {
            let ahead = if setup.clocks.is_empty() {
                0
            } else {
                index as u64 * APART
            };
            let mut clock = Clock::new(ahead, START);
            clock.slew(setup.clocks.get(index).copied().unwrap_or(0), START);
            Node::new(index, clock)
        };
        let mut nodes: Vec<Node> = (0..setup.apiservers).map(node).collect();
        if !setup.members.is_empty() {
            for (index, node) in nodes.iter_mut().enumerate() {
                node.member = setup.members.contains(&index);
                node.up = node.member;
            }
        }
        Self {
            contender,
            now: START,
            queue: Queue::default(),
            groups: Vec::new(),
            clients: Vec::new(),
            identities: Vec::new(),
            connections: Vec::new(),
            balancer: Balancer::new(setup.balancer, Random::new(seed, 1)),
            random: Random::new(seed, 2),
            loads: vec![0.0; nodes.len()],
            uncounted: 0,
            balanced_at: None,
            since: START,
            goaways_before: 0,
            skew_at: START,
            skew: 0.0,
            skew_area: 0.0,
            sides: vec![None; nodes.len()],
            loss: 0.0,
            delays: Vec::new(),
            partition: Vec::new(),
            instances: 0,
            run: Run::default(),
            nodes,
            setup,
        }
    }

    /// Places the clients, starts the agents, plans the incidents.
    fn begin(&mut self) {
        for group in &self.setup.groups {
            self.admit(group.clone());
        }
        let mut order: Vec<usize> = (0..self.clients.len()).collect();
        self.random.shuffle(&mut order);
        match &self.setup.placement {
            Placement::Counts(counts) => {
                let mut order = order.into_iter();
                for (server, count) in counts.iter().enumerate() {
                    for client in order.by_ref().take(*count) {
                        self.land(client, server);
                    }
                    if *count == 0 && self.setup.admission != Admission::default() {
                        self.nodes[server].up_at = START;
                    }
                }
            }
            Placement::Balanced => {
                for client in order {
                    self.connect(client);
                }
            }
        }
        for index in 0..self.connections.len() {
            // Up to an hour and a half old, so that watches are out of step.
            self.connections[index].opened_at = START - millis(self.random.uniform(600.0, 5_400.0));
        }
        self.run.reconnects = 0;
        self.run.swings = 0;
        self.sides.fill(None);
        if self.contender == Contender::Rebalancer {
            for server in 0..self.nodes.len() {
                self.start_agent(server);
            }
        }
        for (number, (at, _)) in self.setup.incidents.iter().enumerate() {
            self.at(START + at.as_millis() as u64, Event::Incident(number));
        }
        if self.setup.churn_per_hour > 0.0 {
            self.plan_restart();
        }
        for server in 0..self.nodes.len() {
            self.plan_call(Some(server), self.setup.strangers.probes);
        }
        self.plan_call(None, self.setup.strangers.calls);
        if self.setup.sample.is_some() {
            self.at(START, Event::Sample);
        }
        self.measure();
    }

    pub(crate) fn open(&mut self, connection: Connection) {
        let (index, server) = (self.connections.len(), connection.server);
        self.nodes[server].open.push(index);
        self.nodes[server].active += 1;
        self.nodes[server].active_load += self.active_load(connection.client);
        self.nodes[server].opened(index, &connection);
        self.balancer.note(connection.client, server, self.nodes.len(), true);
        self.connections.push(connection);
    }

    /// What the load balancer sees of the apiservers.
    pub(crate) fn backends(&self) -> Vec<Backend> {
        let lag = self.setup.admission.lag.as_millis() as u64;
        let slow = self.setup.admission.slow_start.as_millis() as u64;
        let backend = |node: &Node| {
            let admitted_at = if node.up_at == 0 { 0 } else { node.up_at + lag };
            let weight = if node.up_at == 0 || self.now >= admitted_at + slow {
                1.0
            } else {
                (self.now.saturating_sub(admitted_at)) as f64 / slow as f64
            };
            Backend {
                up: node.up && node.member && self.now >= admitted_at,
                active: node.active,
                sockets: node.open.len(),
                weight: weight.max(0.01),
            }
        };
        self.nodes.iter().map(backend).collect()
    }

    fn finish(mut self) -> Run {
        while let Some((at, event)) = self.queue.pop() {
            if at > self.end() {
                break;
            }
            self.now = at;
            self.happen(event);
        }
        self.now = self.end();
        for server in 0..self.nodes.len() {
            self.plan_ended(server);
        }
        self.measure();
        let total = self.run.goaways_total;
        if let Some(at) = self.balanced_at {
            self.run.to_balance = Some(Duration::from_millis(at - self.since));
            self.run.goaways_after = total - self.goaways_before - self.run.goaways;
        } else {
            self.run.goaways = total - self.goaways_before;
        }
        self.run.mean_skew = self.skew_area / (self.now - START).max(1) as f64;
        self.run.last_skew = self.skew;
        self.run.refused_lists = self.nodes.iter().map(|node| node.refused).sum();
        self.run
    }

    fn end(&self) -> u64 {
        let after = |time: Duration| time.as_millis() as u64;
        match self.setup.horizon {
            Horizon::Fixed(length) => START + after(length),
            Horizon::Balanced { limit, after: rest } => match self.balanced_at {
                Some(at) => at + after(rest),
                None => START + after(limit),
            },
        }
    }

    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.queue.push(at, event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Wake(server, wish) => self.wake(server, wish),
            Event::Flush(server) => self.flush(server),
            Event::Poll(server, wish) => self.poll(server, wish),
            Event::Answer(server, from, answer) => self.answered(server, from, *answer),
            Event::Connect(client, attempt) => {
                if self.clients[client].home.is_none() && self.clients[client].attempt == attempt {
                    self.connect(client);
                }
            }
            Event::WatchEnd(connection) => self.watch_ended(connection),
            Event::Close(connection) => self.close(connection),
            Event::Told(connection) => {
                if self.connections[connection].life == Life::Active {
                    self.goaway(connection);
                }
            }
            Event::Call(server) => self.call(server),
            Event::Relist(client) => self.list(client),
            Event::Restart => {
                let client = self.random.below(self.clients.len());
                self.break_client(client);
                self.plan_restart();
            }
            Event::Incident(number) => {
                self.since = self.now;
                self.goaways_before = self.run.goaways_total;
                self.balanced_at = None;
                // What an incident does to the loads is no oscillation.
                self.sides.fill(None);
                self.incident(&self.setup.incidents[number].1.clone());
            }
            Event::Sample => self.sample(),
        }
        self.check_balance();
    }

    /// Clients of one more group, not yet connected; returns the first.
    pub(crate) fn admit(&mut self, group: Group) -> usize {
        let first = self.clients.len();
        for number in 0..group.count {
            self.clients.push(Client {
                group: self.groups.len(),
                requests: group.requests.draw(&mut self.random),
                home: None,
                counted: None,
                last: None,
                elsewhere: 0,
                attempt: 0,
                tries: 0,
                relist: false,
            });
            self.uncounted += 1;
            self.identities.push(Identity {
                user: format!("{}-{}", group.name, first + number),
                user_agent: group.name.clone(),
            });
        }
        self.groups.push(group);
        first
    }

    fn weight_of(&self, client: usize) -> f64 {
        match self.setup.policy.weight {
            Weight::Connections => 1.0,
            Weight::Requests | Weight::Bytes => self.clients[client].requests,
            Weight::Streams => f64::from(self.groups[self.clients[client].group].watches),
        }
    }

    /// What a connection adds to the load of its apiserver: a stranger's nothing.
    fn active_load(&self, client: usize) -> f64 {
        if client == STRANGER {
            0.0
        } else {
            self.weight_of(client)
        }
    }

    pub(crate) fn connect(&mut self, client: usize) {
        let backends = self.backends();
        match self.balancer.pick(
            client,
            self.clients[client].last,
            self.connections.len() as u64,
            &backends,
        ) {
            Some(server) => self.land(client, server),
            None => {
                let tries = self.clients[client].tries;
                self.clients[client].tries += 1;
                let wait = (0.8 * f64::from(1_u32 << tries.min(6))).min(30.0) * self.random.uniform(1.0, 2.0);
                self.connect_in(client, wait);
            }
        }
    }

    pub(crate) fn connect_in(&mut self, client: usize, seconds: f64) {
        self.clients[client].attempt += 1;
        let attempt = self.clients[client].attempt;
        self.at(self.now + millis(seconds), Event::Connect(client, attempt));
    }

    fn land(&mut self, client: usize, server: usize) {
        let index = self.connections.len();
        let weight = self.weight_of(client);
        let known = &mut self.clients[client];
        let group = &self.groups[known.group];
        let connection = Connection {
            client,
            node_local: false,
            server,
            opened_at: self.now,
            life: Life::Active,
            watches: group.watches - known.elsewhere.min(group.watches),
            requests: 0.0,
            counted_at: self.now,
            position: self.nodes[server].open.len(),
        };
        known.home = Some(index);
        known.last = Some(server);
        known.tries = 0;
        let relist = std::mem::take(&mut known.relist) && group.list_seconds > 0.0;
        let rate = known.requests + f64::from(group.watches) * 2_000.0 / (WATCH_LIFE.0 + WATCH_LIFE.1);
        match known.counted.replace(server) {
            Some(before) => self.loads[before] -= weight,
            None => self.uncounted -= 1,
        }
        self.loads[server] += weight;
        self.work(server, f64::from(connection.watches) * WATCH_START);
        self.open(connection);
        self.run.reconnects += 1;
        if relist {
            self.list(client);
        }
        let told_in = match self.contender {
            Contender::GoawayChance(chance) => self.random.wait(rate * chance),
            Contender::MaxConnectionAge(age) => {
                let seconds = age.as_secs_f64() * self.random.uniform(0.9, 1.1);
                // At the start connections are of any age.
                if self.now == START {
                    seconds * self.random.unit()
                } else {
                    seconds
                }
            }
            Contender::Rebalancer | Contender::Nothing => f64::INFINITY,
        };
        if told_in.is_finite() {
            self.at(self.now + millis(told_in), Event::Told(index));
        }
        self.news(server);
        self.measure();
    }

    /// One connection is told to go.
    pub(crate) fn goaway(&mut self, index: usize) {
        let (client, server) = (self.connections[index].client, self.connections[index].server);
        self.take_leave(index);
        self.run.goaways_total += 1;
        if self.setup.sample.is_some() || self.contender == Contender::Rebalancer {
            let up = self.nodes.iter().filter(|node| node.up && node.member).count().max(1);
            let load = self.nodes[server].active_load;
            self.run.marks.push(Mark {
                at: (self.now - START) as f64 / 1000.0,
                server,
                client,
                above_mean: load - self.loads.iter().sum::<f64>() / up as f64,
            });
        }
    }

    /// One connection hears a GOAWAY: its client opens the next one with its next request.
    pub(crate) fn take_leave(&mut self, index: usize) {
        let (client, server, opened_at) = {
            let connection = &mut self.connections[index];
            connection.life = Life::Draining;
            (connection.client, connection.server, connection.opened_at)
        };
        self.nodes[server].active -= 1;
        self.nodes[server].active_load -= self.active_load(client);
        self.nodes[server].touched(index);
        if client == STRANGER {
            return;
        }
        self.clients[client].home = None;
        let watches = self.connections[index].watches;
        self.clients[client].elsewhere += watches;
        let mut first = f64::INFINITY;
        for _ in 0..watches {
            let left = self.watch_left(opened_at);
            first = first.min(left);
            self.at(self.now + millis(left), Event::WatchEnd(index));
        }
        if watches == 0 {
            self.at(self.now + 50, Event::Close(index));
        }
        let next_request = self.random.wait(self.clients[client].requests);
        self.connect_in(client, next_request.min(first) + 0.005);
    }

    /// Seconds until a watch ends that was opened with the connection and anew each time it ended.
    fn watch_left(&mut self, opened_at: u64) -> f64 {
        let (low, high) = WATCH_LIFE;
        let mut age = (self.now - opened_at) as f64;
        // After many lives it does not matter any more when the first one began.
        if age > 3_600_000.0 {
            age = self.random.uniform(1_800_000.0, 3_600_000.0);
        }
        let mut end = 0.0;
        while end <= age {
            end += self.random.uniform(low, high);
        }
        (end - age) / 1000.0
    }

    fn watch_ended(&mut self, index: usize) {
        if self.connections[index].life != Life::Draining {
            return;
        }
        self.connections[index].watches -= 1;
        let client = self.connections[index].client;
        self.clients[client].elsewhere -= 1;
        match self.clients[client].home {
            Some(home) => {
                self.connections[home].watches += 1;
                let server = self.connections[home].server;
                self.work(server, WATCH_START);
                self.nodes[server].touched(home);
                self.news(server);
            }
            None => self.connect(client),
        }
        if self.connections[index].watches == 0 {
            self.close(index);
        }
    }

    fn close(&mut self, index: usize) {
        let Connection {
            client,
            server,
            life,
            position,
            ..
        } = self.connections[index];
        if life == Life::Closed {
            return;
        }
        self.connections[index].life = Life::Closed;
        let node = &mut self.nodes[server];
        node.open.swap_remove(position);
        if let Some(moved) = node.open.get(position) {
            self.connections[*moved].position = position;
        }
        if life == Life::Active {
            node.active -= 1;
            if client != STRANGER {
                self.clients[client].home = None;
                self.nodes[server].active_load -= self.weight_of(client);
            }
        } else if client != STRANGER {
            self.clients[client].elsewhere -= self.connections[index].watches;
        }
        self.nodes[server].ended(index);
        self.balancer.note(client, server, self.nodes.len(), false);
        self.news(server);
    }

    /// A connection breaks: the client comes back at once, and lists if it is one of those.
    pub(crate) fn break_connection(&mut self, index: usize) {
        let Connection { client, life, .. } = self.connections[index];
        self.close(index);
        if life == Life::Active && client != STRANGER {
            self.forget(client);
            self.clients[client].relist = true;
            let wait = self.random.uniform(0.0, 1.0);
            self.connect_in(client, wait);
        }
    }

    /// A client that is nowhere counts nowhere.
    fn forget(&mut self, client: usize) {
        if let Some(server) = self.clients[client].counted.take() {
            self.loads[server] -= self.weight_of(client);
            self.uncounted += 1;
        }
    }

    pub(crate) fn break_client(&mut self, client: usize) {
        if let Some(home) = self.clients[client].home {
            self.break_connection(home);
        }
    }

    fn plan_restart(&mut self) {
        let rate = self.setup.churn_per_hour * self.clients.len() as f64 / 3_600.0;
        let wait = self.random.wait(rate);
        self.at(self.now + millis(wait), Event::Restart);
    }
}
