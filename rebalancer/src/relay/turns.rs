//! Turns: how much is read of one connection before others on its thread come first.
//!
//! Job: whoever wants little is served at once, and whoever wants much stands in line with all others of its thread that
//! do. The first of the line goes on when the thread has looked what else has become ready, and has done that: whoever
//! wants little waits for one turn of somebody else's at most, however many want much. Nobody says how much he wants, so
//! it goes by what he has had since he last had nothing to do (foreground and background, Kleinrock 1976).
//! Must never leave those who want much with nothing, however many want little.
//! Must never wait for somebody who has gone: a place in line ends with whoever has it. Must cost nothing to speak of where
//! nobody wants little: turns are long then.

use std::{
    cell::Cell,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{sync::Semaphore, task::yield_now};

/// How many octets a turn is, of each side of a connection, while everybody on its thread wants much: those that came, or
/// what they cost where that is more.
pub const TURN: usize = 128 * 1024;

/// The same while somebody there wants little.
pub const SHORT_TURN: usize = 16 * 1024;

/// Whoever has had less than that since he was idle wants little: a read's worth, so that ten objects asked for at once are
/// no reason to stand in line.
const LITTLE: usize = 32 * 1024;

/// For so many turns of those who want little, whoever is first in line has another [`SHORT_TURN`], and [`TURN`] at most:
/// where many want little without end, those who want much have a tenth of the thread and not what is left of it.
const BEFORE: u64 = 8;

/// So many times after somebody who wanted little was served, turns are long again: a hundredth of a second or so.
const REMEMBERED: u64 = 256;

/// A place in the line; ready when it is its owner's turn.
type Place = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    /// Who is first of this thread's line: it is fair, and nobody closes it.
    static FIRST: Arc<Semaphore> = Arc::new(Semaphore::new(1));
    /// How often somebody of this thread has asked whether it is his turn, and until when of these turns are short.
    static ASKED: Cell<u64> = const { Cell::new(0) };
    static SHORT_UNTIL: Cell<u64> = const { Cell::new(0) };
    /// How many of those who want little had a turn while somebody stood in line, since its first had one.
    static SERVED: Cell<u64> = const { Cell::new(0) };
}

/// What one connection has had, and its place.
#[derive(Default)]
pub struct Share {
    /// Octets since it had nothing to do.
    had: usize,
    /// The time before that it was busy, it wanted much.
    wanted_much: bool,
    place: Option<Place>,
}

impl Share {
    /// Waits for its turn, and says how many octets that is.
    pub fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<usize> {
        let asked = ASKED.get() + 1;
        ASKED.set(asked);
        let is_short = asked < SHORT_UNTIL.get();
        let free = if is_short { LITTLE } else { TURN };
        // Whoever wanted much the time before will want much again: he is not new where others want little.
        let is_back = self.wanted_much && self.had == 0 && is_short;
        if self.place.is_none() && self.had < free && !is_back {
            if !self.wanted_much && self.had < LITTLE {
                SHORT_UNTIL.set(asked + REMEMBERED);
                SERVED.set(SERVED.get() + 1);
            }
            return Poll::Ready(free - self.had);
        }
        ready!(self.place.get_or_insert_with(place).as_mut().poll(context));
        self.place = None;
        let behind = usize::try_from(SERVED.replace(0) / BEFORE).unwrap_or(usize::MAX);
        Poll::Ready(if is_short {
            SHORT_TURN.saturating_mul(behind).clamp(SHORT_TURN, TURN)
        } else {
            TURN
        })
    }

    /// For a wait that may be given up: its place goes with it, since the line waits for whoever is first.
    pub fn waits(&mut self) -> Waits<'_> {
        Waits { share: self }
    }

    /// It has had so much.
    pub fn spend(&mut self, octets: usize) {
        self.had = self.had.saturating_add(octets);
    }

    /// It has nothing to do.
    pub fn rest(&mut self) {
        debug_assert!(self.place.is_none(), "whoever stands in line wants more");
        self.wanted_much = self.had >= LITTLE;
        self.had = 0;
    }
}

/// A wait that may be given up.
pub struct Waits<'s> {
    /// Whose.
    pub share: &'s mut Share,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.share.place = None;
    }
}

/// Stands in line, at the end. Whoever does is not first at once.
fn place() -> Place {
    let first = FIRST.with(Arc::clone);
    if first.available_permits() > 0 {
        // Nobody has waited for those who were served so far.
        SERVED.set(0);
    }
    Box::pin(async move {
        let is_first = first.acquire().await;
        // Woken when the thread has asked for events, and behind those that they woke.
        yield_now().await;
        // Whoever is next waits in the same way while this one has its turn: no place is held beyond it.
        drop(is_first);
    })
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixStream,
        runtime::Builder,
        task::LocalSet,
    };

    use super::*;

    /// Many that always want more, and one that is asked by a socket: between two of its answers nobody has two turns.
    #[test]
    fn whoever_wants_little_waits_for_one_turn_however_many_want_much() {
        const GREEDY: usize = 50;
        const ASKED: usize = 100;
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let turns = Rc::new(RefCell::new(Vec::new()));
        let (mut here, mut there) = UnixStream::pair_in(&runtime);
        LocalSet::new().block_on(&runtime, async {
            for number in 0..GREEDY {
                let turns = Rc::clone(&turns);
                tokio::task::spawn_local(async move {
                    loop {
                        place().await;
                        turns.borrow_mut().push(number);
                    }
                });
            }
            // Everybody is in line.
            while turns.borrow().len() < GREEDY {
                yield_now().await;
            }
            tokio::task::spawn_local(async move {
                while there.read_u8().await.is_ok() {
                    there.write_u8(1).await.expect("it is open");
                }
            });
            for _ in 0..ASKED {
                let before = turns.borrow().len();
                here.write_u8(0).await.expect("it is open");
                here.read_u8().await.expect("an answer");
                let meanwhile = turns.borrow().len() - before;
                assert!(meanwhile <= 4, "{meanwhile} turns of others for one answer");
            }
            // And each of them had as many turns as the others.
            let turns = turns.borrow();
            let each: Vec<usize> = (0..GREEDY)
                .map(|number| turns.iter().filter(|turn| **turn == number).count())
                .collect();
            let (least, most) = (each.iter().min(), each.iter().max());
            assert!(
                most.zip(least).is_some_and(|(most, least)| most - least <= 1),
                "{each:?}"
            );
        });
    }

    trait PairIn: Sized {
        fn pair_in(runtime: &tokio::runtime::Runtime) -> (Self, Self);
    }

    impl PairIn for UnixStream {
        fn pair_in(runtime: &tokio::runtime::Runtime) -> (Self, Self) {
            let _inside = runtime.enter();
            Self::pair().expect("sockets")
        }
    }

    fn asks(share: &mut Share) -> Poll<usize> {
        share.poll_turn(&mut Context::from_waker(std::task::Waker::noop()))
    }

    #[test]
    fn turns_are_short_where_somebody_wants_little_and_long_where_nobody_does() {
        let mut much = Share::default();
        // Nobody knows yet what it wants.
        assert_eq!(asks(&mut much), Poll::Ready(TURN));
        much.spend(TURN);
        assert_eq!(asks(&mut much), Poll::Pending, "others come first");
        assert_eq!(
            asks(&mut much),
            Poll::Ready(SHORT_TURN),
            "it was new itself a moment ago"
        );
        for _ in 0..REMEMBERED {
            much.spend(SHORT_TURN);
            let _ = asks(&mut much);
        }
        while asks(&mut much).is_pending() {}
        assert_eq!(asks(&mut much), Poll::Pending);
        assert_eq!(asks(&mut much), Poll::Ready(TURN), "it is among its like");
        // One that rests and comes again is not new.
        much.rest();
        assert_eq!(asks(&mut much), Poll::Ready(TURN));
        much.spend(TURN);
        let mut little = Share::default();
        assert_eq!(asks(&mut little), Poll::Ready(TURN));
        little.spend(100);
        assert_eq!(asks(&mut little), Poll::Ready(LITTLE - 100));
        little.rest();
        assert_eq!(asks(&mut little), Poll::Ready(LITTLE));
        assert_eq!(asks(&mut much), Poll::Pending);
        assert_eq!(asks(&mut much), Poll::Ready(SHORT_TURN));
        much.rest();
        assert_eq!(
            asks(&mut much),
            Poll::Pending,
            "it is no newcomer where somebody wants little"
        );
        assert_eq!(asks(&mut much), Poll::Ready(SHORT_TURN));
        much.spend(100);
        much.rest();
        assert_eq!(asks(&mut much), Poll::Ready(LITTLE), "it wanted little itself");
    }

    #[test]
    fn whoever_wants_much_has_his_part_however_many_want_little_without_end() {
        const MANY: u64 = 100;
        const ROUNDS: u64 = 200;
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        LocalSet::new().block_on(&runtime, async {
            let had = Rc::new(Cell::new(0_usize));
            let heavy = Rc::clone(&had);
            tokio::task::spawn_local(async move {
                let mut share = Share::default();
                loop {
                    let turn = std::future::poll_fn(|context| share.poll_turn(context)).await;
                    share.spend(turn);
                    heavy.set(heavy.get() + turn);
                }
            });
            let served = Rc::new(Cell::new(0_u64));
            for _ in 0..MANY {
                let served = Rc::clone(&served);
                tokio::task::spawn_local(async move {
                    let mut share = Share::default();
                    loop {
                        std::future::poll_fn(|context| share.poll_turn(context)).await;
                        share.spend(100);
                        share.rest();
                        served.set(served.get() + 1);
                        yield_now().await;
                    }
                });
            }
            while served.get() < MANY * ROUNDS {
                yield_now().await;
            }
            let least = (served.get() / BEFORE / 2) as usize * SHORT_TURN;
            assert!(had.get() >= least, "{} octets beside {} turns", had.get(), served.get());
        });
    }

    #[test]
    fn a_wait_that_is_given_up_holds_up_nobody() {
        let mut shares: [Share; 2] = std::array::from_fn(|_| Share::default());
        for share in &mut shares {
            assert!(asks(share).is_ready());
            share.spend(TURN);
        }
        let [first, second] = &mut shares;
        let waiting = first.waits();
        assert!(asks(waiting.share).is_pending(), "it is first, and never comes back");
        assert!(asks(second).is_pending());
        assert!(asks(second).is_pending(), "it waits for the first");
        drop(waiting);
        while asks(second).is_pending() {}
    }

    #[tokio::test]
    async fn a_place_ends_with_whoever_has_it() {
        let mut gone = place();
        let waker = std::task::Waker::noop();
        let mut context = std::task::Context::from_waker(waker);
        assert!(gone.as_mut().poll(&mut context).is_pending(), "it is first");
        let mut next = place();
        assert!(next.as_mut().poll(&mut context).is_pending(), "it waits");
        drop(gone);
        next.await;
        place().await;
    }
}
