//! What one connection is told from outside, until its task takes it.
//!
//! Input: notes, from any thread. Output: orders, one at a time, the most urgent first.
//! Must never lose a note, nor deliver one twice.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// What a pump is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Say GOAWAY; over HTTP/1.1, end as soon as no request is lost by it.
    GoAway,
    /// End so many watches, those that were ended before included.
    HandOver(u32),
    /// Say the last GOAWAY although the client has not answered the first.
    Conclude,
    /// Close now.
    Close,
}

/// Notes that nobody has taken.
#[derive(Debug, Default)]
struct Due {
    close: bool,
    go_away: bool,
    conclude: bool,
    hand_over: Option<u32>,
}

impl Due {
    /// Closing stays due: whatever the task does next, it ends.
    fn take(&mut self) -> Option<Order> {
        if self.close {
            Some(Order::Close)
        } else if std::mem::take(&mut self.go_away) {
            Some(Order::GoAway)
        } else if std::mem::take(&mut self.conclude) {
            Some(Order::Conclude)
        } else {
            self.hand_over.take().map(Order::HandOver)
        }
    }
}

/// One connection's.
#[derive(Debug, Default)]
pub struct Mailbox {
    due: Mutex<Due>,
    wake: Notify,
}

impl Mailbox {
    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a note.
    pub fn put(&self, order: Order) {
        let mut due = self.due();
        match order {
            Order::Close => due.close = true,
            Order::GoAway => due.go_away = true,
            Order::Conclude => due.conclude = true,
            Order::HandOver(total) => due.hand_over = Some(total),
        }
        drop(due);
        self.wake.notify_one();
    }

    /// Waits until it is to close, and leaves every other note where it is.
    pub async fn closing(&self) {
        loop {
            let woken = self.wake.notified();
            if self.due().close {
                return;
            }
            woken.await;
        }
    }

    /// Waits for an order. Dropped before it is ready, it has taken none.
    pub async fn take(&self) -> Order {
        loop {
            let woken = self.wake.notified();
            if let Some(order) = self.due().take() {
                return order;
            }
            woken.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn notes_are_taken_once_and_the_most_urgent_first() {
        let mailbox = Mailbox::default();
        mailbox.put(Order::HandOver(1));
        mailbox.put(Order::Conclude);
        mailbox.put(Order::GoAway);
        mailbox.put(Order::HandOver(3));
        assert_eq!(mailbox.take().await, Order::GoAway);
        assert_eq!(mailbox.take().await, Order::Conclude);
        assert_eq!(mailbox.take().await, Order::HandOver(3));
        assert!(mailbox.due().take().is_none());
        mailbox.put(Order::Close);
        assert_eq!(mailbox.take().await, Order::Close);
        assert_eq!(mailbox.take().await, Order::Close);
    }
}
