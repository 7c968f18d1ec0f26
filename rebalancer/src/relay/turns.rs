//! Turns: how much is read of one connection before others on its thread come first.
//!
//! Job: whoever has had a whole turn, and may have more, stands in line with all others of its thread that do. The first of
//! the line goes on when the thread has looked what else has become ready, and has done that: whoever wants little waits
//! for one turn of somebody else's at most, however many want much.
//! Must never wait for somebody who has gone: a place in line ends with whoever has it.

use std::{pin::Pin, sync::Arc};

use tokio::{sync::Semaphore, task::yield_now};

/// How many octets a turn is, of each side of a connection: those that came, or what they cost where that is more.
pub const TURN: usize = 128 * 1024;

/// A place in the line; ready when it is its owner's turn.
pub type Place = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    /// Who is first of this thread's line: it is fair, and nobody closes it.
    static FIRST: Arc<Semaphore> = Arc::new(Semaphore::new(1));
}

/// Stands in line, at the end.
pub fn place() -> Place {
    let first = FIRST.with(Arc::clone);
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
