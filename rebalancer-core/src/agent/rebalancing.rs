//! A rebalancing: from the skew that starts it until every apiserver is within the target.
//!
//! Job: say whether this agent takes part in one, and how many GOAWAYs it may still cost.
//! Input: the balance and the moves of each look. Output: yes or no, and the allowance.
//! Must never go on for ever: it ends at the target, or when it has cost what it needed at its start and a quarter more.

use std::time::Duration;

use super::{motion::Moves, ramp::Vain};
use crate::{
    ids::{ApiserverName, Timestamp},
    planner::{self, Balance, Server},
    rho::Rho,
    view::View,
};

/// A rebalancing may cost this many times what it needed at its start: behind a load balancer that chooses by chance
/// the last moves correct the first ones, and without a bound they would chase chance for ever.
const ALLOWANCE: f64 = 1.25;

/// What an even choice is worth in landings, while few have landed.
const PRIOR: f64 = 2.0;

/// Less than half a GOAWAY is none.
pub(super) const NOTHING: f64 = 0.5;

/// When nothing moves for a while, nobody waits for less of another apiserver: what it has to tell it reckons by what it has
/// seen itself, which is not quite what was seen here.
const LITTLE: f64 = 1.5;

/// A rebalancing that cost what it may is left alone for so long.
const REST: Duration = Duration::from_secs(60);

/// One rebalancing of the cluster, as one agent follows it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Course {
    /// Where the loads stood when it began: one apiserver more or less and it begins anew.
    start: Vec<Server>,
    donors: Vec<ApiserverName>,
    per_connection: f64,
    /// GOAWAYs of all apiservers since it began, without those of plans in vain.
    told: u64,
    /// Of those who were told, so many landed since, and so many of them on no donor. What was learned lately is of a few
    /// looks, and misjudges what the whole of it needs.
    landed: f64,
    elsewhere: f64,
    /// Names it for an operator's approval: when it began.
    pub began: Timestamp,
}

/// Whether a rebalancing is on.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Rebalancing {
    /// Nothing is to be done; so many looks in a row passed the trigger.
    Off(u32),
    /// It is on its course.
    On(Course),
    /// It is over for this agent. Until then it may be the others' still, and goes on here where they push somebody above the
    /// target again: at what it has cost so far.
    Over(Course, Timestamp),
    /// It cost what it may and did not reach the target: what is left is left until then, as long as somebody is above the
    /// trigger or a peer goes on.
    Spent(Timestamp),
}

/// What a look says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signs {
    /// An apiserver whose agent acts is above the trigger.
    pub starts: bool,
    /// Somebody has something to tell, or tells.
    pub is_unfinished: bool,
    /// Somebody's plan is in flight.
    pub is_moving: bool,
    /// An agent takes part in one.
    pub others: bool,
    /// Clients are about to land.
    pub is_landing: bool,
    /// Nobody has been told or has landed for a while.
    pub stands_still: bool,
}

impl Signs {
    /// Of a balance, which rests on this view.
    /// `stands_still` says that nobody has been told or has landed for a while.
    pub fn of(balance: &Balance, view: &View, landing: u64, stands_still: bool) -> Self {
        let is_moving = view.entries.values().any(|entry| entry.snapshot.plan_in_flight);
        let own_quota = if balance.per_connection > 0.0 {
            balance.quota / balance.per_connection
        } else {
            0.0
        };
        Self {
            starts: balance.largest_skew > balance.trigger,
            is_unfinished: is_moving
                || own_quota >= NOTHING
                || balance.largest_quota >= if stands_still { LITTLE } else { NOTHING },
            is_moving,
            others: view.entries.values().any(|entry| entry.snapshot.rebalancing),
            is_landing: landing > 0,
            stands_still,
        }
    }
}

impl Rebalancing {
    /// Counts GOAWAYs, of all apiservers.
    pub fn told(&mut self, goaways: u64) {
        if let Self::On(course) | Self::Over(course, _) = self {
            course.told += goaways;
        }
    }

    /// Follows where those who were told landed.
    pub fn landed(&mut self, moves: &Moves) {
        if let Self::On(course) | Self::Over(course, _) = self {
            course.landed += moves.landed as f64;
            course.elsewhere += moves.elsewhere(&course.donors);
        }
    }

    /// Those GOAWAYs were in vain: they found something out, and count for nothing.
    pub fn in_vain(&mut self, vain: Vain) {
        if let Self::On(course) | Self::Over(course, _) = self {
            course.told = course.told.saturating_sub(vain.told);
            course.landed = (course.landed - vain.landed as f64).max(course.elsewhere);
        }
    }

    /// What it is after a look at this balance.
    ///
    /// It is the cluster's, not one apiserver's: a donor that has reached the target may be pushed above it again by
    /// those who still move. So it goes on, and an agent joins the others', until all are within the target.
    ///
    /// It takes `looks` above the trigger in a row to begin one, and none ends while clients are about to land: they may
    /// push anybody above the target.
    pub fn after(&self, balance: &Balance, signs: Signs, rho: &Rho, looks: u32, now: Timestamp) -> Self {
        let begin = || Self::On(Course::begin(balance, now));
        match self {
            Self::On(course) if !course.is_of(balance) && signs.is_unfinished => begin(),
            Self::On(course) if course.is_of(balance) && signs.is_landing => Self::On(course.joined(balance)),
            Self::On(course) if signs.is_unfinished => {
                let course = course.joined(balance);
                // What is left to all may be nothing to each of them: when all stands still, nobody waits for the others.
                let is_nothing = course.left(rho) < NOTHING
                    || signs.stands_still && balance.quota > 0.0 && course.allowance(balance, rho) < NOTHING;
                if signs.is_moving || !is_nothing {
                    Self::On(course)
                } else {
                    Self::Spent(now + REST)
                }
            }
            // A skew of its own that has come since is another's.
            Self::Over(course, until)
                if now < *until && course.is_of(balance) && signs.others && signs.is_unfinished =>
            {
                Self::On(course.joined(balance))
            }
            Self::Over(course, until) if now < *until && course.is_of(balance) && !signs.starts => self.clone(),
            Self::Spent(until) if now < *until && (signs.starts || signs.others && signs.is_unfinished) => self.clone(),
            Self::Off(before) if signs.starts && before + 1 < looks => Self::Off(before + 1),
            Self::Spent(_) | Self::Over(..) if signs.starts && looks > 1 => Self::Off(1),
            Self::Off(_) | Self::Spent(_) | Self::Over(..) if signs.starts => begin(),
            Self::Off(_) | Self::Over(..) if signs.others && signs.is_unfinished => begin(),
            Self::On(course) if course.is_of(balance) => Self::Over(course.clone(), now + REST),
            Self::Off(_) | Self::On(_) | Self::Spent(_) | Self::Over(..) => Self::Off(0),
        }
    }

    /// Whether `after` is one that begins.
    pub fn begins(&self, after: &Self) -> bool {
        let resumed = match self {
            Self::On(course) | Self::Over(course, _) => Some(course.began),
            Self::Off(_) | Self::Spent(_) => None,
        };
        after.course().is_some_and(|course| {
            let is_on = self.course().is_some();
            !is_on && resumed != Some(course.began)
        })
    }

    /// Whether `after` is one that has reached its target just now.
    pub fn levelled(&self, after: &Self) -> bool {
        matches!((self, after), (Self::On(_), Self::Over(..)))
    }

    /// The course it is on.
    pub fn course(&self) -> Option<&Course> {
        match self {
            Self::On(course) => Some(course),
            Self::Off(_) | Self::Spent(_) | Self::Over(..) => None,
        }
    }
}

impl Course {
    fn begin(balance: &Balance, now: Timestamp) -> Self {
        Self {
            start: balance.servers.clone(),
            donors: balance.donors.clone(),
            per_connection: balance.per_connection,
            told: 0,
            landed: 0.0,
            elsewhere: 0.0,
            began: now,
        }
    }

    /// The same with those whose agents act by now: what they are above the target belongs to its need.
    fn joined(&self, balance: &Balance) -> Self {
        let mut course = self.clone();
        for server in &mut course.start {
            server.acts |= balance.servers.iter().any(|now| now.name == server.name && now.acts);
            if server.acts && server.expected > server.target && !course.donors.contains(&server.name) {
                course.donors.push(server.name.clone());
            }
        }
        course
    }

    /// Whether the apiservers are still the same.
    fn is_of(&self, balance: &Balance) -> bool {
        let names = |servers: &[Server]| servers.iter().map(|server| server.name.clone()).collect::<Vec<_>>();
        names(&self.start) == names(&balance.servers)
    }

    /// Rho of the whole of it: of all who landed since it began, from an even choice.
    fn rho(&self) -> f64 {
        let even = 1.0 - self.donors.len() as f64 / self.start.len().max(1) as f64;
        (self.elsewhere + PRIOR * even.max(0.0)) / (self.landed + PRIOR)
    }

    /// GOAWAYs that it needed at its start, by where those who were told landed since; those who become donors on the way
    /// included.
    pub fn needed(&self, rho: &Rho) -> f64 {
        let names: Vec<&ApiserverName> = self.start.iter().map(|server| &server.name).collect();
        let mean = self.rho();
        let need = planner::need(&self.start, &rho.shares(&names, &self.donors, mean)).all;
        if self.per_connection > 0.0 {
            need / self.per_connection
        } else {
            0.0
        }
    }

    /// GOAWAYs that it may still cost, all apiservers together.
    pub fn left(&self, rho: &Rho) -> f64 {
        (ALLOWANCE * self.needed(rho) - self.told as f64).max(0.0)
    }

    /// This apiserver's part of that: as its need is of all donors' together.
    pub fn allowance(&self, balance: &Balance, rho: &Rho) -> f64 {
        self.left(rho) * balance.needed_part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING_TO_SEE: Signs = Signs {
        starts: false,
        is_unfinished: false,
        is_moving: false,
        others: false,
        is_landing: false,
        stands_still: false,
    };

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(1_000 * seconds)
    }

    /// Apiservers of those loads, the target 3 % above the mean; the first is this agent's.
    fn balance(loads: &[f64]) -> Balance {
        let mean = loads.iter().sum::<f64>() / loads.len() as f64;
        let target = 1.03 * mean;
        let server = |(index, load): (usize, &f64)| Server {
            name: ApiserverName::new(format!("n{index}")),
            load: *load,
            expected: *load,
            connections: *load as u64,
            fair: 1.0 / loads.len() as f64,
            target,
            acts: true,
        };
        let servers: Vec<Server> = loads.iter().enumerate().map(server).collect();
        let donors = servers.iter().filter(|server| server.load > target);
        Balance {
            mean,
            ceiling: target,
            skew: loads[0] / mean - 1.0,
            expected_skew: loads[0] / mean - 1.0,
            largest_skew: loads.iter().fold(0.0, |most: f64, load| most.max(load / mean - 1.0)),
            noise_floor: 0.0,
            trigger: 0.1,
            donors: donors.map(|server| server.name.clone()).collect(),
            rho: 1.0,
            surplus: loads.iter().map(|load| (load - target).max(0.0)).sum(),
            surplus_part: 0.5,
            needed: 0.0,
            needed_part: 0.5,
            quota: 0.0,
            room: 0.0,
            largest_quota: 0.0,
            per_connection: 1.0,
            servers,
        }
    }

    /// One that began at 5 s on (150, 150, 0), and has told so many.
    fn on(told: u64) -> Rebalancing {
        let mut rebalancing = Rebalancing::On(Course::begin(&balance(&[150.0, 150.0, 0.0]), at(5)));
        rebalancing.told(told);
        rebalancing
    }

    fn words(rebalancing: &Rebalancing) -> String {
        match rebalancing {
            Rebalancing::Off(looks) => format!("off {looks}"),
            Rebalancing::On(course) => format!("on since {}", course.began.as_millis() / 1_000),
            Rebalancing::Over(course, until) => {
                let seconds = |at: Timestamp| at.as_millis() / 1_000;
                format!("over until {}, since {}", seconds(*until), seconds(course.began))
            }
            Rebalancing::Spent(until) => format!("spent until {}", until.as_millis() / 1_000),
        }
    }

    #[test]
    fn it_begins_goes_on_rests_and_ends() {
        use Rebalancing::{Off, Over, Spent};
        let now = at(100);
        let starts = Signs {
            starts: true,
            is_unfinished: true,
            ..NOTHING_TO_SEE
        };
        let unfinished = Signs {
            is_unfinished: true,
            ..NOTHING_TO_SEE
        };
        let others = Signs {
            others: true,
            ..unfinished
        };
        let moving = Signs {
            is_moving: true,
            ..unfinished
        };
        let landing = Signs {
            is_landing: true,
            ..NOTHING_TO_SEE
        };
        // By an even choice 282 are needed, and a quarter more may be told.
        let (some, all) = (on(280), on(360));
        let over = |until| Over(some.course().expect("it is on").clone(), at(until));
        for (before, signs, looks, expected) in [
            (Off(0), NOTHING_TO_SEE, 1, "off 0"),
            (Off(0), starts, 1, "on since 100"),
            (Off(0), starts, 3, "off 1"),
            (Off(1), starts, 3, "off 2"),
            (Off(2), starts, 3, "on since 100"),
            (Off(2), unfinished, 3, "off 0"),
            (Off(0), others, 1, "on since 100"),
            (
                Off(0),
                Signs {
                    others: true,
                    ..NOTHING_TO_SEE
                },
                1,
                "off 0",
            ),
            (some.clone(), unfinished, 1, "on since 5"),
            (some.clone(), landing, 1, "on since 5"),
            (some.clone(), NOTHING_TO_SEE, 1, "over until 160, since 5"),
            (over(101), others, 1, "on since 5"),
            (over(101), NOTHING_TO_SEE, 1, "over until 101, since 5"),
            (over(101), starts, 1, "on since 100"),
            (over(101), starts, 3, "off 1"),
            (over(100), others, 1, "on since 100"),
            (over(100), NOTHING_TO_SEE, 1, "off 0"),
            (all.clone(), unfinished, 1, "spent until 160"),
            (all.clone(), starts, 1, "spent until 160"),
            (all.clone(), moving, 1, "on since 5"),
            (all, landing, 1, "on since 5"),
            (Spent(at(101)), starts, 1, "spent until 101"),
            (Spent(at(101)), others, 1, "spent until 101"),
            (Spent(at(101)), unfinished, 1, "off 0"),
            (Spent(at(100)), starts, 1, "on since 100"),
            (Spent(at(100)), starts, 3, "off 1"),
            (Spent(at(100)), NOTHING_TO_SEE, 1, "off 0"),
        ] {
            let balance = balance(&[120.0, 120.0, 60.0]);
            let after = before.after(&balance, signs, &Rho::default(), looks, now);
            assert_eq!(words(&after), expected, "{before:?} {signs:?} {looks}");
        }
        // With an apiserver more or less it is another one.
        for (signs, expected) in [(unfinished, "on since 100"), (landing, "off 0")] {
            let after = some.after(&balance(&[150.0, 50.0]), signs, &Rho::default(), 1, now);
            assert_eq!(words(&after), expected, "{signs:?}");
        }
    }

    #[test]
    fn what_is_less_than_one_to_each_of_them_is_nothing_once_all_stands_still() {
        let unfinished = Signs {
            is_unfinished: true,
            ..NOTHING_TO_SEE
        };
        // 282 are needed by an even choice and 352.5 allowed, of which 351 are told.
        for (part, stands_still, quota, expected) in [
            (0.3, false, 10.0, "on since 5"),
            (0.3, true, 10.0, "spent until 160"),
            // Who has nothing to tell waits for those who have.
            (0.3, true, 0.0, "on since 5"),
            (0.4, true, 10.0, "on since 5"),
        ] {
            let mut balance = balance(&[120.0, 120.0, 60.0]);
            (balance.quota, balance.needed_part) = (quota, part);
            let signs = Signs {
                stands_still,
                ..unfinished
            };
            let rebalancing = on(351);
            let course = rebalancing.course().expect("it is on");
            let allowance = course.allowance(&balance, &Rho::default());
            assert!((allowance - 1.5 * part).abs() < 0.01, "{allowance}");
            let after = rebalancing.after(&balance, signs, &Rho::default(), 1, at(100));
            assert_eq!(words(&after), expected, "{part} {stands_still} {quota}");
        }
    }

    #[test]
    fn probes_in_vain_cost_nothing_and_who_becomes_a_donor_on_the_way_is_reckoned_with() {
        let mut rebalancing = on(40);
        let left = |rebalancing: &Rebalancing| rebalancing.course().expect("it is on").left(&Rho::default());
        let before = left(&rebalancing);
        let vain = Vain { told: 40, landed: 40 };
        rebalancing.in_vain(vain);
        assert!((left(&rebalancing) - before - 40.0).abs() < 1e-6);
        let signs = Signs {
            is_unfinished: true,
            ..NOTHING_TO_SEE
        };
        let mut uneven = balance(&[150.0, 98.0, 52.0]);
        uneven.servers[1].acts = false;
        let first = Rebalancing::On(Course::begin(&uneven, at(5)));
        let joined = first.after(&balance(&[130.0, 110.0, 60.0]), signs, &Rho::default(), 1, at(6));
        assert!(left(&joined) >= left(&first), "{joined:?}");
    }
}
