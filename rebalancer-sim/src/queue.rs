//! What happens in a run, in order of its clock.

use std::{cmp::Ordering, collections::BinaryHeap};

use rebalancer_core::{
    ids::ApiserverName,
    view::{PeerFault, Snapshot},
};

/// What is due at an instant.
#[derive(Debug)]
pub(crate) enum Event {
    /// An agent wants to be called; the second number tells an old wish from the newest.
    Wake(usize, u64),
    /// A batch of observations is complete.
    Flush(usize),
    /// An agent asks its peers.
    Poll(usize, u64),
    /// A peer's answer arrives.
    Answer(usize, ApiserverName, Box<Result<Snapshot, PeerFault>>),
    /// A client connects.
    Connect(usize, u32),
    /// A watch on a draining connection ends.
    WatchEnd(usize),
    /// A connection without streams is closed.
    Close(usize),
    /// The lottery, or the age limit, tells a connection.
    Told(usize),
    /// A client lists everything.
    Relist(usize),
    /// Some client restarts.
    Restart,
    /// A stranger calls: one on that apiserver's own node, or one through the load balancer.
    Call(Option<usize>),
    /// An incident of the setup.
    Incident(usize),
    /// A point of the picture.
    Sample,
}

#[derive(Debug)]
struct Due {
    at: u64,
    sequence: u64,
    event: Event,
}

/// What is planned, in the order it happens.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    due: BinaryHeap<Due>,
    sequence: u64,
}

impl Queue {
    /// Plans something for an instant.
    pub(crate) fn push(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        let sequence = self.sequence;
        self.due.push(Due { at, sequence, event });
    }

    /// What comes next, and when.
    pub(crate) fn pop(&mut self) -> Option<(u64, Event)> {
        self.due.pop().map(|due| (due.at, due.event))
    }
}

impl Ord for Due {
    /// The earliest is the greatest, for the heap; of two at the same instant the one that was planned first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}
