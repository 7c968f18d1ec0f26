//! A guest's clock: an emulated one can run away on a busy machine.

use std::{
    thread,
    time::{Duration, Instant},
};

/// The kernel's arguments by which a guest that counts time-stamps tells the time: they are this machine's own, and how fast
/// they go it need not find out on a busy machine, where it may only be wrong by one of a hundred then (arch/x86/kernel/tsc.c).
/// `None` where they cannot be had, or are no steady measure.
pub fn by_time_stamps() -> Option<String> {
    let found = (0..TRIES).find_map(|_| {
        let (one, other) = (pace()?, pace()?);
        ((one / other - 1.0).abs() < 0.0005).then_some(one)
    });
    // Nothing in an emulated processor says that its counters do not differ, or stand still: they do not.
    found.map(|khz| format!("tsc_early_khz={khz:.0} tsc=reliable"))
}

/// Whoever reads counter and clock may be interrupted between the two.
const TRIES: usize = 10;

/// How many thousand time-stamps a second has.
fn pace() -> Option<f64> {
    let both = || {
        let reads = (0..TRIES).map(|_| {
            let (began, stamp) = (Instant::now(), time_stamp());
            (began.elapsed(), began, stamp)
        });
        let (_, at, stamp) = reads.min_by_key(|(took, _, _)| *took)?;
        Some((at, stamp?))
    };
    let (began, first) = both()?;
    thread::sleep(Duration::from_millis(200));
    let (ended, last) = both()?;
    let khz = last.checked_sub(first)? as f64 / ended.duration_since(began).as_secs_f64() / 1e3;
    (khz > 0.0).then_some(khz)
}

#[cfg(target_arch = "x86_64")]
fn time_stamp() -> Option<u64> {
    // SAFETY: RDTSC reads a register, and may be executed by any process.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn time_stamp() -> Option<u64> {
    None
}

/// A guest's clock beside this machine's.
#[derive(Default)]
pub struct GuestClock {
    first: Option<(f64, Instant)>,
    last: Option<(f64, Instant)>,
}

impl GuestClock {
    /// An emulated clock that is so many times as fast as this one's has run away: waits of minutes are over in seconds.
    const TIMES: f64 = 1.5;
    /// What it may be ahead at most all the same, in seconds.
    const AHEAD: f64 = 20.0;

    /// The guest has said how many seconds it is old.
    pub fn told(&mut self, guest: f64, here: Instant) {
        self.first.get_or_insert((guest, here));
        self.last = Some((guest, here));
    }

    /// What there is to say when it has run away.
    pub fn runaway(&self) -> Option<String> {
        let ((first, began), (last, ended)) = (self.first?, self.last?);
        let (guest, here) = (last - first, ended.duration_since(began).as_secs_f64());
        (guest > here * Self::TIMES + Self::AHEAD).then(|| {
            format!(
                "the guest's clock has run away: {guest:.0} s there were {here:.0} s here, so its waits were too short"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In thousands a second: a guest that is told another unit refuses to boot, or lives a thousand times too fast.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_guest_is_told_how_fast_time_stamps_go() {
        let Some(told) = by_time_stamps() else {
            panic!("this machine's time-stamps are no steady measure");
        };
        let (first, began) = (time_stamp().expect("x86-64"), Instant::now());
        thread::sleep(Duration::from_millis(500));
        let (last, took) = (time_stamp().expect("x86-64"), began.elapsed());
        let khz: f64 = told["tsc_early_khz=".len()..told.find(' ').expect("two arguments")]
            .parse()
            .expect("a number");
        let passed = (last - first) as f64 / khz / 1e3;
        let ratio = passed / took.as_secs_f64();
        assert!((0.5..2.0).contains(&ratio), "{passed} s were {took:?}");
    }

    #[test]
    fn a_clock_that_runs_away_is_called_that() {
        let now = Instant::now();
        let after = |guest: f64, seconds: u64| {
            let mut clock = GuestClock::default();
            clock.told(2.0, now);
            clock.told(2.0 + guest, now + Duration::from_secs(seconds));
            clock.runaway()
        };
        assert_eq!(after(60.0, 60), None);
        assert_eq!(after(110.0, 60), None);
        assert_eq!(after(10.0, 60), None);
        let said = after(10_143.0, 366).expect("a clock that ran away");
        assert!(said.contains("10143 s there were 366 s here"), "{said}");
        assert_eq!(GuestClock::default().runaway(), None);
    }
}
