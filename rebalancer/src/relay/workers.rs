//! The threads that serve connections, each with an event loop of its own: a connection stays on one thread, and no
//! byte wakes another. Handshakes have threads of their own, between which and those the kernel is fair: a signature takes
//! as long as many requests, and strangers ask for as many as they like.
//!
//! Input: connections' tasks. Must never move a task, nor let one thread have many more than another, nor have a timer
//! while connections are idle: with one, each wait for events sets the processor's clock and takes it back.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::runtime::{Builder, Handle};

/// All threads.
#[derive(Debug)]
pub struct Workers {
    serving: Vec<Worker>,
    doors: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    name: String,
    /// Tasks it has.
    tasks: Arc<AtomicUsize>,
    began: Instant,
    /// Milliseconds from its beginning to when it was asked whether it moves; [`ANSWERED`] once it has said so.
    asked: Arc<AtomicU64>,
    /// Tasks it has begun and ended.
    moved: Arc<AtomicU64>,
    /// How many those were when somebody last looked whether it moves.
    seen: AtomicU64,
}

/// A thread owes no answer.
const ANSWERED: u64 = u64::MAX;

impl Workers {
    /// One thread of each kind a processor that this process may use.
    ///
    /// # Errors
    ///
    /// The system has no thread to give.
    pub fn start() -> io::Result<Self> {
        Self::of(thread::available_parallelism().map_or(1, usize::from))
    }

    fn of(count: usize) -> io::Result<Self> {
        let serving = (0..count).map(|index| Worker::start(format!("relay-{index}")));
        let doors = (0..count).map(|index| Worker::start(format!("relay-door-{index}")));
        Ok(Self {
            serving: serving.collect::<io::Result<_>>()?,
            doors: doors.collect::<io::Result<_>>()?,
        })
    }

    /// A thread that owes an answer for longer than that, and has neither begun nor ended a task meanwhile, if there is one.
    /// Every other is asked anew: whoever wants to know asks again and again.
    pub fn standing_still(&self, limit: Duration) -> Option<&str> {
        // Each is asked, also behind one that stands still.
        let still: Vec<&Worker> = self
            .serving
            .iter()
            .chain(&self.doors)
            .filter(|worker| !worker.moves(limit))
            .collect();
        still.first().map(|worker| worker.name.as_str())
    }

    /// Runs a task on the thread that has the fewest of those that serve.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        Worker::least(&self.serving, task);
    }

    /// The same for a handshake: with the client, and with the apiserver for its sake.
    pub fn shake_hands(&self, task: impl Future<Output = ()> + Send + 'static) {
        Worker::least(&self.doors, task);
    }
}

impl Worker {
    fn least(all: &[Self], task: impl Future<Output = ()> + Send + 'static) {
        let Some(worker) = all.iter().min_by_key(|worker| worker.tasks.load(Relaxed)) else {
            // There is always one.
            return;
        };
        let counted = Counted::new(&worker.tasks);
        let moved = Arc::clone(&worker.moved);
        // A future within a future is held twice.
        let task = Box::pin(task);
        worker.runtime.spawn(async move {
            let _counted = counted;
            moved.fetch_add(1, Relaxed);
            task.await;
            moved.fetch_add(1, Relaxed);
        });
    }

    fn start(name: String) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        thread::Builder::new()
            .name(name.clone())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
        Ok(Self {
            runtime: handle,
            name,
            tasks: Arc::default(),
            began: Instant::now(),
            asked: Arc::new(AtomicU64::new(ANSWERED)),
            moved: Arc::default(),
            seen: AtomicU64::new(0),
        })
    }

    /// Whether it does not owe an answer for longer than that, or has begun or ended a task since it was asked this last;
    /// asks it when it owes none. A thread that has thousands of handshakes to do, which strangers may see to, comes to its
    /// answer behind all of them.
    fn moves(&self, limit: Duration) -> bool {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(ANSWERED - 1);
        let moved = self.moved.load(Relaxed);
        if self.seen.swap(moved, Relaxed) != moved {
            self.asked
                .fetch_update(Relaxed, Relaxed, |asked| (asked != ANSWERED).then_some(now))
                .ok();
        }
        match self.asked.load(Relaxed) {
            ANSWERED => {
                self.asked.store(now, Relaxed);
                let asked = Arc::clone(&self.asked);
                self.runtime.spawn(async move { asked.store(ANSWERED, Relaxed) });
                true
            }
            since => Duration::from_millis(now.saturating_sub(since)) <= limit,
        }
    }
}

/// A task while it lasts, however it ends.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(tasks: &Arc<AtomicUsize>) -> Self {
        tasks.fetch_add(1, Relaxed);
        Self(Arc::clone(tasks))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::mpsc};

    use super::*;

    #[test]
    fn a_thread_that_is_held_up_is_noticed_and_the_others_are_not() {
        let workers = Workers::of(2).expect("threads");
        let (go_on, held) = mpsc::channel::<()>();
        workers.serving[1].runtime.spawn(async move {
            // It blocks the thread, until the test has seen it.
            let _ = held.recv();
        });
        let limit = Duration::from_secs(2);
        let began = Instant::now();
        let mut noticed = None;
        while noticed.is_none() && began.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(50));
            noticed = workers.standing_still(limit).map(str::to_owned);
        }
        assert_eq!(noticed.as_deref(), Some("relay-1"));
        drop(go_on);
        while workers.standing_still(limit).is_some() {
            assert!(began.elapsed() < Duration::from_secs(120), "it goes on");
            thread::sleep(Duration::from_millis(50));
        }
    }

    #[test]
    fn a_thread_that_owes_an_answer_behind_much_work_does_not_stand_still() {
        let workers = Workers::of(1).expect("threads");
        let (go_on, held) = mpsc::channel::<()>();
        workers.doors[0].runtime.spawn(async move {
            let _ = held.recv();
        });
        let limit = Duration::from_millis(50);
        for _ in 0..20 {
            // Handshakes that were before the question in the queue.
            workers.doors[0].moved.fetch_add(1, Relaxed);
            assert_eq!(workers.standing_still(limit), None);
            thread::sleep(Duration::from_millis(10));
        }
        let began = Instant::now();
        while workers.standing_still(limit) != Some("relay-door-0") {
            assert!(began.elapsed() < Duration::from_secs(60), "nothing moves any more");
            thread::sleep(Duration::from_millis(10));
        }
        drop(go_on);
    }

    #[test]
    fn tasks_are_spread_evenly_and_stay_on_their_thread() {
        let workers = Workers::of(2).expect("threads");
        let (told, tasks) = mpsc::channel();
        let stay = Arc::new(tokio::sync::Semaphore::new(0));
        for task in 0..10 {
            let (told, stay) = (told.clone(), Arc::clone(&stay));
            workers.spawn(async move {
                let before = thread::current().id();
                // Closed, when all are there.
                let _ = stay.acquire().await;
                told.send((task, before, thread::current().id()))
                    .expect("the test waits");
            });
        }
        stay.close();
        let mut each = HashMap::new();
        for _ in 0..10 {
            let (task, before, after) = tasks.recv().expect("every task ends");
            assert_eq!(before, after, "task {task} has moved");
            *each.entry(after).or_insert(0) += 1;
        }
        let mut each: Vec<i32> = each.into_values().collect();
        each.sort_unstable();
        // None has ended while tasks were spawned, since all wait for the same word.
        assert_eq!(each, [5, 5]);
    }
}
