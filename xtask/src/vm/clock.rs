//! A guest's clock: an emulated one can run away on a busy machine.

use std::time::Instant;

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
    use std::time::Duration;

    use super::*;

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
