//! What the probe answered, as a metric.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use rebalancer_common::steer::{ANSWER_NAMES, ANSWERS};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AnswerLabel {
    answer: &'static str,
}

/// `rebalancer_steer_answers_total`, over all apiservers the agent had a probe on.
#[derive(Clone, Debug, Default)]
pub struct Answers(Family<AnswerLabel, Counter>);

impl Answers {
    /// The metric to be registered; each answer is there from the start.
    pub fn family(&self) -> Family<AnswerLabel, Counter> {
        self.add(&[0; ANSWERS as usize]);
        self.0.clone()
    }

    /// Counts what was answered since the last time, by the `ANSWER_` constants.
    pub fn add(&self, newly: &[u64; ANSWERS as usize]) {
        for (answer, newly) in ANSWER_NAMES.into_iter().zip(newly) {
            self.0.get_or_create(&AnswerLabel { answer }).inc_by(*newly);
        }
    }
}
