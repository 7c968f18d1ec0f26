use std::collections::BTreeSet;

use super::{
    super::{Resources, Rule},
    *,
};

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

fn rule(subject: Subject, verbs: &[&str], api_group: &str, resources: &[&str]) -> Rule {
    let list = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect();
    Rule {
        subjects: vec![subject],
        resources: vec![Resources {
            verbs: list(verbs),
            api_groups: list(&[api_group]),
            resources: list(resources),
            namespaces: list(&["*"]),
            cluster_scope: true,
        }],
    }
}

fn schema(name: &str, level: &str, precedence: u32, rules: Vec<Rule>) -> Schema {
    Schema {
        name: name.into(),
        level: level.into(),
        precedence,
        rules,
    }
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
    .map(|(name, level, precedence, subject, takes_all)| {
        let rules = match name {
            _ if takes_all => vec![rule(subject, &["*"], "*", &["*"])],
            // Of URLs alone.
            "probes" => Vec::new(),
            "system-node-high" => vec![rule(subject, &["*"], "", &["nodes", "nodes/status"])],
            _ => vec![rule(
                subject,
                &["get", "create", "update"],
                "coordination.k8s.io",
                &["leases"],
            )],
        };
        schema(name, level, precedence, rules)
    })
    .into()
}

fn question(subject: Subject) -> Question {
    Question {
        subject,
        verbs: vec!["list".into(), "watch".into()],
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
        whose: "user agent \"cilium-agent\"".into(),
        open_requests: 60,
        open_watches: 7,
        bytes: 90_000_000,
        all_bytes: 100_000_000,
        schemas: Vec::new(),
    });
    let advice = advise(&asked).expect("an advice");
    // 3 shares beside 245 are 600 * 3 / 248 = 7.3 seats, so 8, of which a LIST takes 2.
    assert_eq!((advice.seats, advice.lists_at_once), (8, 4));
    let text = advice.text();
    for part in [
        "nominalConcurrencyShares: 3\n",
        "borrowingLimitPercent: 0\n",
        "matchingPrecedence: 8998\n",
        "name: \"system:serviceaccount:d8-cni-cilium:agent\"",
        "queuing: {queues: 1, handSize: 1, queueLengthLimit: 50}",
        "verbs: [\"list\", \"watch\"]",
        "user agent \"cilium-agent\": 60 requests and 7 watches are open now",
        "90 % of everybody's",
        "Now they match FlowSchema service-accounts and level",
        "this comes before FlowSchemas service-accounts, global-default, catch-all: list, watch of user",
        "such a watch takes seats as a LIST does until these are sent, and none after that",
        "at most 4 large LISTs from the watch cache at once, 2 seats each",
        "others borrow up to 4 of the 8: the next ones begin with 4, at most 2 large LISTs at once",
        "4 would run at once and 50 wait, and 6 are answered 429 at once",
        "level workload-low, which has 245 of 600 seats; it borrows every seat",
        "about 14 times as late",
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

fn placed(asked: &Question) -> (u32, String) {
    let advice = advise(asked).expect("an advice");
    let (_, rest) = advice
        .manifest
        .split_once("matchingPrecedence: ")
        .expect("a precedence");
    let precedence = rest.lines().next().and_then(|text| text.parse().ok());
    (precedence.expect("a number"), advice.text())
}

#[test]
fn a_hold_comes_before_whatever_its_requests_match_and_says_so() {
    for (asked, precedence) in [
        (user("system:serviceaccount:kube-system:x"), 898),
        (user("system:serviceaccount:other:x"), 8_998),
        (user("system:node:a"), 398),
        // Leader election asks for no list.
        (user("system:kube-scheduler"), 798),
        (user("alice"), 9_898),
        (question(Subject::Group("system:nodes".into())), 399),
        (question(Subject::Group("dev".into())), 9_899),
        (question(Subject::Group("system:serviceaccounts:a".into())), 8_999),
    ] {
        assert_eq!(placed(&asked).0, precedence, "{:?}", asked.subject);
    }
    let accounts = "system:serviceaccounts:d8-cni-cilium";
    let narrow = |verb: &str| {
        let rules = vec![rule(Subject::Group(accounts.into()), &[verb], "cilium.io", &["*"])];
        schema("cilium-pods", "workload-high", 1_000, rules)
    };
    for (subject, verb, precedence) in [
        (
            Subject::User("system:serviceaccount:d8-cni-cilium:agent".into()),
            "list",
            998,
        ),
        (Subject::Group(accounts.into()), "list", 999),
        (
            Subject::User("system:serviceaccount:d8-cni-cilium:agent".into()),
            "delete",
            8_998,
        ),
        (Subject::User("system:serviceaccount:other:agent".into()), "list", 8_998),
    ] {
        let mut asked = question(subject);
        asked.schemas.push(narrow(verb));
        let (got, text) = placed(&asked);
        assert_eq!(got, precedence, "{:?} {verb}", asked.subject);
        let says = text.contains(
            "match FlowSchema cilium-pods with a part of it (list * of \"cilium.io\") and level workload-high",
        ) && text
            .contains("this comes before FlowSchemas cilium-pods, service-accounts, global-default, catch-all: list");
        assert_eq!(says, precedence < 1_000, "{text}");
    }
}

#[test]
fn what_depends_on_groups_that_nobody_knows_is_called_so() {
    let mut asked = user("alice");
    let dev = Subject::Group("dev".into());
    asked.schemas.push(schema(
        "dev-lists",
        "workload-low",
        1_000,
        vec![rule(dev, &["list"], "*", &["*"])],
    ));
    let (precedence, text) = placed(&asked);
    assert_eq!(precedence, 9_898);
    for part in [
        "Now they presumably match FlowSchema global-default",
        "should it be in \"dev\" or \"system:masters\" or ",
        "taken by FlowSchemas exempt, system-node-high, system-nodes, kube-system-service-accounts, dev-lists, \
         service-accounts before this, and are not held",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    // An answer has shown it.
    asked.observed = Some(Observed {
        schemas: vec!["dev-lists".into(), "probes".into()],
        ..Observed::default()
    });
    let (precedence, text) = placed(&asked);
    assert_eq!(precedence, 998);
    assert!(text.contains("match FlowSchema dev-lists with a part of it"), "{text}");
    // A service account is in no group that its name does not say.
    let (_, text) = placed(&user("system:serviceaccount:a:b"));
    assert!(!text.contains("presumably") && !text.contains("not known"), "{text}");
}

/// The hold that is printed, as the cluster has it once it is applied.
fn applied(asked: &Question) -> Schema {
    let advice = advise(asked).expect("an advice");
    let verbs: Vec<&str> = asked.verbs.iter().map(String::as_str).collect();
    let rules = vec![rule(asked.subject.clone(), &verbs, "*", &["*"])];
    schema(&advice.name, &advice.name, placed(asked).0, rules)
}

#[test]
fn a_users_hold_comes_before_his_groups_whichever_is_asked_for_first() {
    for (one, other, of) in [
        (
            "system:serviceaccount:a:b",
            "system:serviceaccount:a:c",
            "system:serviceaccounts:a",
        ),
        ("system:node:a", "system:node:b", "system:nodes"),
        ("alice", "bob", "dev"),
    ] {
        let subjects = [
            Subject::User(one.into()),
            Subject::Group(of.into()),
            Subject::User(other.into()),
        ];
        for order in [[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 1, 0]] {
            // At the floor of precedences names decide.
            for floor in [false, true] {
                let mut cluster = schemas();
                if floor {
                    let everybody = Subject::Group("system:authenticated".into());
                    cluster.retain(|schema| schema.precedence < 3);
                    cluster.push(schema(
                        "some",
                        "catch-all",
                        3,
                        vec![rule(everybody, &["*"], "*", &["*"])],
                    ));
                }
                // Twice: what is asked again stays where it is, or comes no later.
                for index in order.into_iter().chain(order) {
                    let mut asked = question(subjects[index].clone());
                    asked.schemas.clone_from(&cluster);
                    let hold = applied(&asked);
                    cluster.retain(|schema| schema.name != hold.name);
                    cluster.push(hold);
                }
                let position = |index: usize| {
                    let name = name_of(&subjects[index]);
                    let schema = cluster.iter().find(|schema| schema.name == name);
                    schema.expect("it is there").position()
                };
                assert!(
                    position(0) < position(1) && position(2) < position(1),
                    "{of} {order:?} {floor}: {cluster:?}"
                );
            }
        }
    }
}

#[test]
fn a_particular_hold_that_a_groups_would_take_over_is_named() {
    // Of a user whose hold stands after what his group matches: somebody made the group's schema since.
    let account = "system:serviceaccount:a:b";
    let mut asked = question(Subject::Group("system:serviceaccounts:a".into()));
    asked.schemas.push(applied(&user(account)));
    let (precedence, text) = placed(&asked);
    assert_eq!(precedence, 8_999);
    assert!(
        text.contains(
            "some users of the group are taken by FlowSchema rebalancer-hold-user-system-serviceaccount-a-b-"
        ),
        "{text}"
    );
    let rules = vec![rule(asked.subject.clone(), &["list"], "*", &["pods"])];
    asked.schemas.push(schema("pods", "workload-low", 500, rules));
    let (precedence, text) = placed(&asked);
    assert_eq!(precedence, 499);
    assert!(
        text.contains("It comes also before FlowSchema rebalancer-hold-user-system-serviceaccount-a-b-"),
        "{text}"
    );
    // A precedence that somebody has who is nobody of theirs is no obstacle, and what is there by the same name is not
    // looked at.
    let mut asked = user("alice");
    let own = applied(&asked);
    let carol = vec![rule(Subject::User("carol".into()), &["*"], "*", &["*"])];
    asked.schemas.push(schema("other", "catch-all", 9_898, carol));
    asked.schemas.push(own.clone());
    asked.levels.push(Level {
        name: own.name.clone(),
        is_exempt: false,
        shares: 1_000,
        borrowing_limit_percent: Some(0),
    });
    let again = advise(&asked).expect("an advice");
    assert_eq!((applied(&asked), again.seats), (own, 8));
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
                    schemas: vec!["exempt".into()],
                    ..Observed::default()
                });
            }),
            "exempt by FlowSchema exempt",
        ),
        (
            changed(|asked| {
                let everybody = Subject::Group("system:authenticated".into());
                asked
                    .schemas
                    .push(schema("a", "catch-all", 2, vec![rule(everybody, &["*"], "*", &["*"])]));
            }),
            "FlowSchema a has matchingPrecedence 2, and nothing may come before it",
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
