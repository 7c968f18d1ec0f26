//! The events of the programs, read out of the memory they write: each in the place its turn has.
//!
//! Job: give each event once, in the order they happened, and say how many were overwritten before they were read.
//! Must never take a place that is being written for an event: whoever writes does not wait for who reads.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed},
        fence,
    },
};

use rebalancer_common::{EVENTS, Event};

/// Words of an event.
const WORDS: usize = size_of::<Event>() / 8;

/// A place that was taken and is still not written after so many looks is given up: whoever took it was overtaken by a whole
/// round of the others, and its place may hold an older event for good.
const LOOKS: u32 = 20;

/// A map's memory, which the kernel's programs write meanwhile.
#[derive(Debug)]
struct Memory {
    begin: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is the mapping's own, is unmapped once, and is only read, by atomic loads.
unsafe impl Send for Memory {}

impl Memory {
    fn of(map: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        // SAFETY: a new mapping of a map's values, which the kernel refuses unless there are so many.
        let begin = unsafe {
            libc::mmap(
                ptr::null_mut(),
                words * 8,
                libc::PROT_READ,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if begin == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let begin = NonNull::new(begin.cast()).ok_or_else(|| io::Error::other("it is mapped nowhere"))?;
        Ok(Self { begin, words })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.words, "word {at} of {}", self.words);
        // SAFETY: within the mapping, which lives as long as this value, and aligned as pages are.
        unsafe { self.begin.add(at).as_ref() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `of` made, which nothing refers to any more.
        unsafe { libc::munmap(self.begin.as_ptr().cast(), self.words * 8) };
    }
}

/// The events, and how far they were read.
#[derive(Debug)]
pub struct Events {
    turns: Memory,
    places: Memory,
    read: u64,
    lost: u64,
    /// How often the next place was found not written yet.
    looks: u32,
}

impl Events {
    /// Of the maps `TURNS` and `EVENTS`.
    ///
    /// # Errors
    ///
    /// They cannot be mapped.
    pub fn of(turns: BorrowedFd<'_>, places: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            turns: Memory::of(turns, 1)?,
            places: Memory::of(places, EVENTS as usize * WORDS)?,
            read: 0,
            lost: 0,
            looks: 0,
        })
    }

    /// How many were overwritten before they were read, since the last time this was asked.
    pub fn lost(&mut self) -> u64 {
        // Also of those that nobody has looked for yet.
        let turns = self.turns.word(0).load(Acquire);
        self.is_overwritten(turns);
        std::mem::take(&mut self.lost)
    }

    /// The next one; `None` when all are read, or the next one is being written.
    pub fn next(&mut self) -> Option<Event> {
        loop {
            let turns = self.turns.word(0).load(Acquire);
            if turns == self.read {
                return None;
            }
            if self.is_overwritten(turns) {
                continue;
            }
            let at = (self.read % u64::from(EVENTS)) as usize * WORDS;
            // Written last: with it all of the event is there.
            let turn = self.places.word(at).load(Acquire);
            let words: [u64; WORDS] = std::array::from_fn(|word| self.places.word(at + word).load(Relaxed));
            // A turn is taken before its place is written: if any of that was read, this is newer.
            fence(Acquire);
            let turns = self.turns.word(0).load(Relaxed);
            if self.is_overwritten(turns) {
                continue;
            }
            if turn == self.read + 1 {
                self.step();
                return Some(event(words));
            }
            self.looks += 1;
            if self.looks < LOOKS {
                return None;
            }
            self.lost += 1;
            self.step();
        }
    }

    fn step(&mut self) {
        self.read += 1;
        self.looks = 0;
    }

    /// Whether the next place may be another event's by now; then all that are gone are counted, and left out.
    fn is_overwritten(&mut self, turns: u64) -> bool {
        let oldest = turns.saturating_sub(u64::from(EVENTS));
        let gone = oldest.saturating_sub(self.read);
        self.lost += gone;
        self.read += gone;
        if gone > 0 {
            self.looks = 0;
        }
        gone > 0
    }
}

/// An event from its words, as they are in memory.
fn event(words: [u64; WORDS]) -> Event {
    let halves = |word: u64| {
        let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
        [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
    };
    let [turn, cookie, kind_and_port, token_and_start, told @ ..] = words;
    let ([kind, remote_port], [token, start]) = (halves(kind_and_port), halves(token_and_start));
    Event {
        turn,
        cookie,
        kind,
        remote_port,
        token,
        start,
        told,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{
            fd::{AsFd as _, FromRawFd as _},
            unix::fs::FileExt as _,
        },
        sync::atomic::Ordering::SeqCst,
        thread,
    };

    use super::*;

    /// Memory that stands for a map.
    fn file(octets: u64) -> File {
        // SAFETY: the name ends in zero; the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"map".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(octets).expect("memory");
        file
    }

    fn write(turns: &File, places: &File, turn: u64) {
        let at = ((turn - 1) % u64::from(EVENTS)) * size_of::<Event>() as u64;
        let words = [turn, turn * 7, 1 | 443 << 32, 5 | 1 << 32, 11, 12, 13, turn];
        let octets: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
        turns.write_all_at(&turn.to_ne_bytes(), 0).expect("a turn");
        places.write_all_at(&octets, at).expect("an event");
    }

    fn maps() -> (File, File, Events) {
        let (turns, places) = (file(8), file(u64::from(EVENTS) * size_of::<Event>() as u64));
        let events = Events::of(turns.as_fd(), places.as_fd()).expect("mapped");
        (turns, places, events)
    }

    #[test]
    fn each_event_is_read_once_and_in_order() {
        let (turns, places, mut events) = maps();
        assert_eq!(events.next(), None);
        for turn in 1..=3 {
            write(&turns, &places, turn);
        }
        let first = events.next().expect("the first");
        let expected = Event {
            turn: 1,
            cookie: 7,
            kind: 1,
            remote_port: 443,
            token: 5,
            start: 1,
            told: [11, 12, 13, 1],
        };
        if cfg!(target_endian = "little") {
            assert_eq!(first, expected);
        }
        assert_eq!(
            [events.next(), events.next()].map(|event| event.map(|event| event.turn)),
            [Some(2), Some(3)]
        );
        assert_eq!((events.next(), events.lost()), (None, 0));
        // A turn that is taken, and whose place is not written yet.
        turns.write_all_at(&4_u64.to_ne_bytes(), 0).expect("a turn");
        assert_eq!(events.next(), None);
        write(&turns, &places, 4);
        assert_eq!(events.next().map(|event| event.turn), Some(4));
    }

    #[test]
    fn a_place_that_nobody_ever_writes_holds_up_those_after_it_for_a_while_only() {
        let (turns, places, mut events) = maps();
        // The first turn's writer is gone, or wrote over a later round's event; the second one is there.
        write(&turns, &places, 2);
        let mut looks = 0;
        let second = loop {
            looks += 1;
            match events.next() {
                Some(event) => break event,
                None => assert!(looks < LOOKS, "it waits for ever"),
            }
        };
        assert_eq!((second.turn, looks), (2, LOOKS));
        assert_eq!((events.next(), events.lost()), (None, 1));
    }

    #[test]
    fn what_is_overwritten_is_counted() {
        let (turns, places, mut events) = maps();
        let room = u64::from(EVENTS);
        for turn in 1..=room {
            write(&turns, &places, turn);
        }
        // All of them are there still.
        assert_eq!(events.next().map(|event| event.turn), Some(1));
        for turn in room + 1..=room + 10 {
            write(&turns, &places, turn);
        }
        // Before anybody has looked.
        assert_eq!((events.lost(), events.lost()), (9, 0));
        assert_eq!(events.next().map(|event| event.turn), Some(11));
        let mut rest = 0;
        while events.next().is_some() {
            rest += 1;
        }
        assert_eq!((rest, events.lost()), (room - 1, 0));
    }

    #[test]
    fn nothing_is_read_that_is_half_written() {
        const WRITTEN: u64 = 2_000_000;
        let (turns, places, mut events) = maps();
        // A writer that is as careless as a processor: it takes its turn, writes, and says so at the end.
        let (own_turns, own_places) = (turns.try_clone().expect("a file"), places.try_clone().expect("a file"));
        let writer = thread::spawn(move || {
            let shared = |file: &File, octets: usize| {
                // SAFETY: a new shared mapping of the test's own file.
                let begin = unsafe {
                    let both = libc::PROT_READ | libc::PROT_WRITE;
                    libc::mmap(ptr::null_mut(), octets, both, libc::MAP_SHARED, file.as_raw_fd(), 0)
                };
                assert_ne!(begin, libc::MAP_FAILED);
                begin.cast::<AtomicU64>()
            };
            let turns = shared(&own_turns, 8);
            let places = shared(&own_places, EVENTS as usize * size_of::<Event>());
            for _ in 0..WRITTEN {
                // SAFETY: within the mappings, which nothing unmaps.
                unsafe {
                    let before = (*turns).fetch_add(1, SeqCst);
                    let place = places.add((before % u64::from(EVENTS)) as usize * WORDS);
                    for word in 1..WORDS {
                        (*place.add(word)).store(before + 1, Relaxed);
                    }
                    (*place).store(before + 1, std::sync::atomic::Ordering::Release);
                }
            }
        });
        let (mut read, mut lost) = (0_u64, 0);
        while read + lost < WRITTEN {
            while let Some(event) = events.next() {
                read += 1;
                assert_eq!((event.cookie, event.told), (event.turn, [event.turn; 4]));
            }
            lost += events.lost();
        }
        assert_eq!(read + lost, WRITTEN, "{read} read, {lost} lost");
        writer.join().expect("the writer ends well");
    }
}
