//! Seats: how many a level has by its shares, and how many a LIST takes.
//!
//! Job: the arithmetic of k8s.io/apiserver/pkg/util/flowcontrol (apf_controller.go, `finishQueueSetReconfigsLocked`, and
//! request/list_work_estimator.go). Input and output: numbers. Must never promise a level more than the server has.

/// The part of a level's seats that one LIST may take (apf_controller.go, `priorityLevelMaxSeatsPercent`).
const WIDEST_PART: f64 = 0.15;

/// The most seats that a LIST from the watch cache takes: for 1 MB held at once, at 100 kB a seat (`bytesPerSeat`,
/// `cacheWithStreamingMaxMemoryUsage`). One from etcd may take up to 100 (`maximumListSeatsLimit`), so that fewer run at once.
const WIDEST: u32 = 10;

/// More shares than that are not tried.
const MOST_SHARES: u32 = 100_000;

/// The seats of a level with so many of all levels' shares: ceil(server * shares / all).
pub fn nominal_seats(server_seats: u32, shares: u32, all_shares: u32) -> u32 {
    if all_shares == 0 {
        return 0;
    }
    let seats = f64::from(server_seats) * f64::from(shares) / f64::from(all_shares);
    seats.ceil() as u32
}

/// How many seats the largest LIST from the watch cache takes at most in a level of so many seats, where one flow has `hand_size` queues.
pub fn widest_list(seats: u32, hand_size: u32) -> u32 {
    let part = (f64::from(seats) * WIDEST_PART).ceil() as u32;
    part.min(seats / hand_size.max(1)).clamp(1, WIDEST)
}

/// How many of the largest LISTs run at once in a level of so many seats that borrows none.
pub fn lists_at_once(seats: u32, hand_size: u32) -> u32 {
    (seats / widest_list(seats, hand_size)).max(1)
}

/// How many of a level's seats others may have at most: round(seats * lendablePercent / 100).
pub(super) fn lent(seats: u32, lendable_percent: u32) -> u32 {
    let lent = (f64::from(seats) * f64::from(lendable_percent) / 100.0).round() as u32;
    lent.min(seats)
}

/// The most shares beside `others` with which no more than `lists` of the largest LISTs run at once, and never half of the
/// server's seats; one where none are few enough, since a share of a large server is several seats.
pub(super) fn shares_for(lists: u32, hand_size: u32, server_seats: u32, others: u32) -> u32 {
    let fits = |shares: &u32| {
        let seats = nominal_seats(server_seats, *shares, others.saturating_add(*shares));
        lists_at_once(seats, hand_size) <= lists
    };
    (1..others.min(MOST_SHARES)).rev().find(fits).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_levels_have_the_seats_they_have() {
        // `apiserver_flowcontrol_nominal_limit_seats` of a kube-apiserver 1.36 with its defaults: 600 seats, 245 shares.
        for (shares, seats) in [(5, 13), (30, 74), (40, 98), (10, 25), (100, 245), (20, 49), (0, 0)] {
            assert_eq!(nominal_seats(600, shares, 245), seats, "{shares}");
        }
        assert_eq!(nominal_seats(600, 5, 0), 0);
    }

    #[test]
    fn no_more_shares_would_do() {
        for others in [2, 5, 245, 10_000] {
            for server in [10, 600, 3_000] {
                for lists in 1..20 {
                    let shares = shares_for(lists, 1, server, others);
                    let at_once = |shares: u32| lists_at_once(nominal_seats(server, shares, others + shares), 1);
                    assert!(shares == 1 || at_once(shares) <= lists, "{others} {server} {lists}");
                    assert!(
                        (shares + 1..others).all(|more| at_once(more) > lists),
                        "{others} {server} {lists}"
                    );
                }
            }
        }
        // Of 600 seats beside 245 shares: 3 shares are 8 seats, 2 for a LIST.
        assert_eq!(shares_for(4, 1, 600, 245), 3);
        assert_eq!(shares_for(4, 1, 600, 0), 1);
    }

    #[test]
    fn a_list_is_as_wide_as_the_apiserver_lets_it_be() {
        // Seats, hand, width: max(1, min(ceil(0.15 seats), seats / hand)), and never more than 10.
        for (seats, hand, width) in [
            (1, 1, 1),
            (7, 1, 2),
            (7, 4, 1),
            (14, 4, 3),
            (14, 8, 1),
            (98, 6, 10),
            (245, 6, 10),
            (0, 1, 1),
        ] {
            assert_eq!(widest_list(seats, hand), width, "{seats} {hand}");
        }
        for (seats, hand, lists) in [
            (1, 1, 1),
            (2, 1, 2),
            (6, 1, 6),
            (7, 1, 3),
            (14, 4, 4),
            (14, 8, 14),
            (245, 6, 24),
        ] {
            assert_eq!(lists_at_once(seats, hand), lists, "{seats} {hand}");
        }
    }
}
