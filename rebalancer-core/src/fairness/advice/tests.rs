use super::*;

/// The levels of a kube-apiserver 1.36 that nobody changed (k8s.io/apiserver/pkg/apis/flowcontrol/bootstrap).
fn levels() -> Vec<Level> {
    [
        ("catch-all", 5),
        ("exempt", 0),
        ("global-default", 20),
        ("leader-election", 10),
        ("node-high", 40),
        ("system", 30),
        ("workload-high", 40),
        ("workload-low", 100),
    ]
    .map(|(name, shares)| Level {
        name: name.into(),
        is_exempt: name == "exempt",
        shares,
        borrowing_limit_percent: None,
    })
    .into()
}

/// And its schemas.
fn schemas() -> Vec<Schema> {
    let group = |name: &str| Subject::Group(name.into());
    [
        ("exempt", "exempt", 1, group("system:masters"), true),
        ("probes", "exempt", 2, group("system:authenticated"), false),
        (
            "system-leader-election",
            "leader-election",
            100,
            Subject::User("system:kube-scheduler".into()),
            false,
        ),
        ("system-node-high", "node-high", 400, group("system:nodes"), false),
        ("system-nodes", "system", 500, group("system:nodes"), true),
        (
            "kube-scheduler",
            "workload-high",
            800,
            Subject::User("system:kube-scheduler".into()),
            true,
        ),
        (
            "kube-system-service-accounts",
            "workload-high",
            900,
            group("system:serviceaccounts:kube-system"),
            true,
        ),
        (
            "service-accounts",
            "workload-low",
            9_000,
            group("system:serviceaccounts"),
            true,
        ),
        (
            "global-default",
            "global-default",
            9_900,
            group("system:authenticated"),
            true,
        ),
        ("catch-all", "catch-all", 10_000, group("system:authenticated"), true),
    ]
    .map(|(name, level, precedence, subject, takes_all)| Schema {
        name: name.into(),
        level: level.into(),
        precedence,
        subjects: vec![subject],
        takes_all,
    })
    .into()
}

fn question(subject: Subject) -> Question {
    Question {
        subject,
        verbs: vec!["list".into()],
        lists: 4,
        heavy: 4,
        server_seats: 600,
        levels: levels(),
        schemas: schemas(),
        observed: None,
    }
}

fn user(name: &str) -> Question {
    question(Subject::User(name.into()))
}

#[test]
fn a_service_account_is_held_with_few_seats_of_its_own() {
    let mut asked = user("system:serviceaccount:d8-cni-cilium:agent");
    asked.observed = Some(Observed {
        open_streams: 60,
        bytes: 90_000_000,
        all_bytes: 100_000_000,
        schema: Some("service-accounts".into()),
    });
    let advice = advise(&asked).expect("an advice");
    // 3 shares beside 245 are 600 * 3 / 248 = 7.3 seats, so 8, of which a LIST takes 2.
    assert_eq!((advice.seats, advice.lists_at_once), (8, 4));
    let text = advice.text();
    for part in [
        "nominalConcurrencyShares: 3\n",
        "borrowingLimitPercent: 0\n",
        "matchingPrecedence: 8999\n",
        "name: \"system:serviceaccount:d8-cni-cilium:agent\"",
        "queuing: {queues: 1, handSize: 1, queueLengthLimit: 50}",
        "verbs: [\"list\"]",
        "60 requests are open now",
        "90 % of everybody's",
        "level workload-low, which has 245 of 600 seats; it borrows every seat",
        "about 15 times as late",
        "workload-low 245 to 242",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    assert!(
        text.lines()
            .take_while(|line| !line.starts_with("apiVersion"))
            .all(|line| line.starts_with("# "))
    );
}

#[test]
fn who_is_held_still_matches_what_is_more_particular_first() {
    for (asked, precedence) in [
        (user("system:serviceaccount:kube-system:x"), 899),
        (user("system:serviceaccount:other:x"), 8_999),
        (user("system:node:a"), 499),
        (user("system:kube-scheduler"), 799),
        (user("alice"), 9_899),
        (question(Subject::Group("system:nodes".into())), 499),
        (question(Subject::Group("dev".into())), 9_899),
        (question(Subject::Group("system:serviceaccounts:a".into())), 8_999),
    ] {
        let advice = advise(&asked).expect("an advice");
        assert!(
            advice.manifest.contains(&format!("matchingPrecedence: {precedence}\n")),
            "{:?}: {}",
            asked.subject,
            advice.manifest
        );
    }
    // A precedence that somebody has is not taken, and what is there by the same name is not looked at.
    let mut asked = user("alice");
    let own = advise(&asked).expect("an advice");
    for (name, precedence) in [("other", 9_899), (own.name.as_str(), 9_898)] {
        asked.schemas.push(Schema {
            name: name.into(),
            level: own.name.clone(),
            precedence,
            subjects: Vec::new(),
            takes_all: false,
        });
    }
    asked.levels.push(Level {
        name: own.name.clone(),
        is_exempt: false,
        shares: 1_000,
        borrowing_limit_percent: Some(0),
    });
    let again = advise(&asked).expect("an advice");
    assert!(
        again.manifest.contains("matchingPrecedence: 9898\n"),
        "{}",
        again.manifest
    );
    assert_eq!((again.name, again.seats), (own.name, own.seats));
}

#[test]
fn a_groups_quiet_users_keep_queues_of_their_own() {
    for heavy in [1, 4, 16, 64] {
        let mut asked = question(Subject::Group("dev".into()));
        asked.heavy = heavy;
        let hand = hand_of(&asked).expect("a hand");
        assert!(
            hand.is_valid() && crowded_out(hand, heavy) <= CROWDED_OUT,
            "{heavy}: {hand:?}"
        );
        let text = advise(&asked).expect("an advice").text();
        assert!(text.contains("distinguisherMethod: {type: ByUser}"), "{text}");
        assert!(text.contains(&format!("crowded out by {heavy} heavy ones")), "{text}");
    }
}

#[test]
fn what_cannot_be_answered_is_refused_in_a_sentence() {
    let changed = |change: fn(&mut Question)| {
        let mut asked = user("alice");
        change(&mut asked);
        asked
    };
    let group = |name: &str| question(Subject::Group(name.into()));
    for (asked, part) in [
        (user(""), "has no name"),
        (user("a\nb"), "control character"),
        (user("*"), "nearly everybody"),
        (group("system:authenticated"), "nearly everybody"),
        (group("system:serviceaccounts"), "nearly everybody"),
        (group("system:masters"), "exempt"),
        (user("system:apiserver"), "exempt"),
        (changed(|asked| asked.lists = 0), "--lists 0: allowed is 1 to 50"),
        (changed(|asked| asked.heavy = 65), "--heavy 65: allowed is 1 to 64"),
        (changed(|asked| asked.server_seats = 9), "9: allowed is 10 to"),
        (
            changed(|asked| asked.verbs = vec!["lst".into()]),
            "--verb \"lst\": allowed is",
        ),
        (
            changed(|asked| asked.verbs = vec!["*".into(), "get".into()]),
            "--verb * stands for all",
        ),
        (changed(|asked| asked.verbs.clear()), "--verb is not given"),
        (
            changed(|asked| asked.levels.clear()),
            "no PriorityLevelConfiguration is known",
        ),
        (
            changed(|asked| asked.levels.iter_mut().for_each(|level| level.shares = 0)),
            "no shares at all",
        ),
        (
            changed(|asked| {
                asked.observed = Some(Observed {
                    schema: Some("exempt".into()),
                    ..Observed::default()
                });
            }),
            "exempt by FlowSchema exempt",
        ),
    ] {
        let Refused(why) = advise(&asked).expect_err(part);
        assert!(why.contains(part), "{part}: {why}");
        assert!(!why.contains('\n') && why.len() < 300, "{why}");
    }
}

#[test]
fn names_are_those_that_objects_may_have_and_tell_subjects_apart() {
    let names: BTreeSet<String> = ["a", "A", "a:", ":a", "system:node:a", "ü", "-", "a.b", &"x".repeat(300)]
        .iter()
        .flat_map(|name| [Subject::User((*name).into()), Subject::Group((*name).into())])
        .map(|subject| name_of(&subject))
        .collect();
    assert_eq!(names.len(), 18);
    for name in names {
        assert!(
            name.len() <= 80
                && name
                    .bytes()
                    .all(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-')
        );
        assert!(name.ends_with(|c: char| c.is_ascii_alphanumeric()), "{name}");
    }
}

#[test]
fn however_few_or_many_seats_a_server_has_the_bound_is_kept_where_shares_are_fine_enough() {
    for server_seats in [50, 600, 3_000] {
        for lists in [1, 2, 3, 4, 10] {
            let mut asked = user("alice");
            (asked.server_seats, asked.lists) = (server_seats, lists);
            let advice = advise(&asked).expect("an advice");
            assert!(advice.seats >= 1 && advice.seats <= server_seats);
            // A share of a large server is several seats.
            let least = lists_at_once(nominal_seats(server_seats, 1, 246), 1);
            assert!(
                advice.lists_at_once <= lists.max(least),
                "{server_seats} {lists}: {advice:?}"
            );
            let says_so = advice.text().contains("cannot be had");
            assert_eq!(says_so, advice.lists_at_once > lists, "{advice:?}");
        }
    }
}
