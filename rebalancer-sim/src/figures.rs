//! What a run showed, and what many runs showed together.
//!
//! Input: runs. Output: means and percentiles. Must never round.

use std::{collections::BTreeMap, time::Duration};

/// Loads at one instant, for the picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Seconds since the start.
    pub at: f64,
    /// Load of each apiserver.
    pub loads: Vec<f64>,
    /// Draining connections of each.
    pub draining: Vec<usize>,
}

/// One GOAWAY.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mark {
    /// Seconds since the start.
    pub at: f64,
    /// The apiserver that sent it.
    pub server: usize,
    /// The client that was told.
    pub client: usize,
    /// How far the apiserver is above the mean of those that are up, once that client has left; in load.
    pub above_mean: f64,
}

/// What one run showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// GOAWAYs sent from the last incident, or the start, until the balance was reached; to the end when it was not.
    pub goaways: u64,
    /// GOAWAYs sent afterwards.
    pub goaways_after: u64,
    /// From the last incident, or the start, to the balance.
    pub to_balance: Option<Duration>,
    /// GOAWAYs over the whole run.
    pub goaways_total: u64,
    /// New connections over the whole run.
    pub reconnects: u64,
    /// Lists that were refused because too many ran.
    pub refused_lists: u64,
    /// The most seconds of LIST work that waited on one apiserver.
    pub worst_list_queue: f64,
    /// Mean over time of how far the fullest apiserver is above the mean.
    pub mean_skew: f64,
    /// The same at the end.
    pub last_skew: f64,
    /// How often an apiserver swung from further above the mean than the threshold and than chance to as far below it, or
    /// back: oscillation.
    pub swings: u64,
    /// Decisions of the agents, and those that started a plan.
    pub decisions: u64,
    /// Plans among them.
    pub plans: u64,
    /// Holds by reason.
    pub holds: BTreeMap<&'static str, u64>,
    /// Plans that went on for longer than their pace, their orders' life and the settle time allow.
    pub overdue_plans: u64,
    /// The most seconds for which an agent decided nothing but that hold, by reason.
    pub longest_holds: BTreeMap<&'static str, f64>,
    /// The GOAWAYs, when there is a picture or the rebalancer sent them.
    pub marks: Vec<Mark>,
    /// Loads over time.
    pub series: Vec<Sample>,
    /// What plans said of themselves, the first of the run.
    pub explanations: Vec<String>,
}

/// Many runs of one contender.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// How many runs.
    pub runs: usize,
    /// How many reached the balance.
    pub balanced: usize,
    /// Mean GOAWAYs until balance.
    pub goaways_mean: f64,
    /// 95 % of the runs needed no more.
    pub goaways_p95: f64,
    /// Mean GOAWAYs after the balance.
    pub goaways_after_balance: f64,
    /// Mean GOAWAYs over the whole run.
    pub goaways_total: f64,
    /// Mean time to balance, of those that reached it.
    pub seconds_to_balance: Option<f64>,
    /// Mean of the mean skews.
    pub mean_skew: f64,
    /// Mean of the skews at the end.
    pub last_skew: f64,
    /// Mean of reconnects.
    pub reconnects: f64,
    /// Mean of the swings.
    pub swings: f64,
    /// Mean of refused lists.
    pub refused_lists: f64,
    /// Mean of the longest queues of LIST work.
    pub worst_list_queue: f64,
}

/// Sums up.
pub fn summarise(runs: &[Run]) -> Summary {
    let count = runs.len().max(1) as f64;
    let mean = |figure: &dyn Fn(&Run) -> f64| runs.iter().map(figure).sum::<f64>() / count;
    let times: Vec<f64> = runs
        .iter()
        .filter_map(|run| run.to_balance)
        .map(|time| time.as_secs_f64())
        .collect();
    let mut goaways: Vec<u64> = runs.iter().map(|run| run.goaways).collect();
    goaways.sort_unstable();
    let rank = (goaways.len() as f64 * 0.95).ceil() as usize;
    Summary {
        runs: runs.len(),
        balanced: times.len(),
        goaways_mean: mean(&|run| run.goaways as f64),
        goaways_p95: goaways.get(rank.saturating_sub(1)).map_or(0.0, |count| *count as f64),
        goaways_after_balance: mean(&|run| run.goaways_after as f64),
        goaways_total: mean(&|run| run.goaways_total as f64),
        seconds_to_balance: (!times.is_empty()).then(|| times.iter().sum::<f64>() / times.len() as f64),
        mean_skew: mean(&|run| run.mean_skew),
        last_skew: mean(&|run| run.last_skew),
        reconnects: mean(&|run| run.reconnects as f64),
        swings: mean(&|run| run.swings as f64),
        refused_lists: mean(&|run| run.refused_lists as f64),
        worst_list_queue: mean(&|run| run.worst_list_queue),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_one_that_occurred() {
        let runs: Vec<Run> = (1..=100)
            .map(|goaways| Run {
                goaways,
                to_balance: (goaways % 2 == 0).then(|| Duration::from_secs(goaways)),
                ..Run::default()
            })
            .collect();
        let summary = summarise(&runs);
        assert_eq!((summary.goaways_mean, summary.goaways_p95), (50.5, 95.0));
        assert_eq!((summary.balanced, summary.seconds_to_balance), (50, Some(51.0)));
    }
}
