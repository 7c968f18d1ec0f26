//! A rebalancing: from the skew that starts it until every apiserver is within the target.
//!
//! Job: say whether this agent takes part in one, and how many GOAWAYs it may still cost.
//! Input: the balance and the moves of each look. Output: yes or no, and the allowance.
//! Must never go on for ever: it ends at the target, or when it has cost what it needed at its start and a quarter more.

use crate::{ids::ApiserverName, planner::Balance, rho::Rho, view::View};

/// A rebalancing may cost this many times what it needed at its start: behind a load balancer that chooses by chance
/// the last moves correct the first ones, and without a bound they would chase chance for ever.
const ALLOWANCE: f64 = 1.25;

/// Less than half a GOAWAY is none.
const NOTHING: f64 = 0.5;

/// One rebalancing of the cluster, as one agent follows it.
#[derive(Clone, Debug)]
pub(super) struct Course {
    /// How many apiservers took connections when it began: one more or less and it begins anew.
    apiservers: usize,
    donors: Vec<ApiserverName>,
    /// In connections of mean weight.
    surplus: f64,
    /// GOAWAYs of all apiservers since it began.
    told: u64,
}

/// Whether a rebalancing is on.
#[derive(Clone, Debug)]
pub(super) enum Rebalancing {
    /// Nothing is to be done; so many looks in a row passed the trigger.
    Off(u32),
    /// It is on its course.
    On(Course),
    /// It cost what it may and did not reach the target: what is left is left, whatever the peers still do.
    Spent,
}

impl Rebalancing {
    /// Counts GOAWAYs, of all apiservers.
    pub fn told(&mut self, goaways: u64) {
        if let Self::On(course) = self {
            course.told += goaways;
        }
    }

    /// What it is after a look at this balance, which rests on this view.
    ///
    /// It is the cluster's, not one apiserver's: a donor that has reached the target may be pushed above it again by
    /// those who still move. So it goes on, and an agent joins the others', until all are within the target.
    ///
    /// It takes `looks` above the trigger in a row to begin one, and none ends while clients are about to land: they may
    /// push anybody above the target.
    pub fn after(&self, balance: &Balance, view: &View, landing: u64, rho: &Rho, looks: u32) -> Self {
        let moving = view.entries.values().any(|entry| entry.snapshot.plan_in_flight);
        let others = view.entries.values().any(|entry| entry.snapshot.rebalancing);
        let starts = balance.largest_skew > balance.trigger;
        let unfinished = moving || balance.largest_quota >= NOTHING;
        match self {
            Self::On(course) if landing > 0 && course.apiservers == balance.apiservers => self.clone(),
            Self::On(course) if unfinished && course.apiservers == balance.apiservers => {
                if moving || course.left(rho) >= NOTHING {
                    self.clone()
                } else if starts {
                    Self::On(Course::begin(balance))
                } else {
                    Self::Spent
                }
            }
            Self::On(_) if unfinished => Self::On(Course::begin(balance)),
            Self::Off(before) if starts && before + 1 < looks => Self::Off(before + 1),
            Self::Spent if starts && looks > 1 => Self::Off(1),
            Self::Off(_) | Self::Spent if starts => Self::On(Course::begin(balance)),
            Self::Off(_) if others && unfinished => Self::On(Course::begin(balance)),
            Self::Spent if others && unfinished => Self::Spent,
            Self::Off(_) | Self::On(_) | Self::Spent => Self::Off(0),
        }
    }

    /// The course it is on.
    pub fn course(&self) -> Option<&Course> {
        match self {
            Self::On(course) => Some(course),
            Self::Off(_) | Self::Spent => None,
        }
    }
}

impl Course {
    fn begin(balance: &Balance) -> Self {
        Self {
            apiservers: balance.apiservers,
            donors: balance.donors.clone(),
            surplus: balance.surplus_connections,
            told: 0,
        }
    }

    /// GOAWAYs that it may still cost, all apiservers together.
    pub fn left(&self, rho: &Rho) -> f64 {
        let rho = rho.mean(&self.donors, self.apiservers).max(f64::EPSILON);
        (ALLOWANCE * self.surplus / rho - self.told as f64).max(0.0)
    }
}
