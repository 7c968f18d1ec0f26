//! What RequestInfo of k8s.io/apiserver v0.36.2 says of the same requests (`NewRequestInfo` with the prefixes `api` and
//! `apis`, and `ListOptions` of the query): method, target, whether it is a watch, whether it asks for initial events.
//! What a watch begins with besides follows from its `resourceVersion`.

use super::*;

#[rustfmt::skip]
const REQUEST_INFO: &[(&str, &str, bool, bool)] = &[
    ("GET", "/api/v1/pods?watch=true", true, false),
    ("GET", "/api/v1/pods?watch=1", true, false),
    ("GET", "/api/v1/pods?watch", true, false),
    ("GET", "/api/v1/pods?watch=", true, false),
    ("GET", "/api/v1/pods?watch=True", true, false),
    ("GET", "/api/v1/pods?watch=t", true, false),
    ("GET", "/api/v1/pods?watch=no", true, false),
    ("GET", "/api/v1/pods?watch=false", false, false),
    ("GET", "/api/v1/pods?watch=FALSE", false, false),
    ("GET", "/api/v1/pods?watch=0", false, false),
    ("GET", "/api/v1/pods?watch=false&watch=true", false, false),
    ("GET", "/api/v1/pods?watch=true&watch=false", true, false),
    ("GET", "/api/v1/pods?%77atch=true", true, false),
    ("GET", "/api/v1/pods?watch=%66alse", false, false),
    ("GET", "/api/v1/pods?wat+ch=true", false, false),
    ("GET", "/api/v1/pods?watch=%zz", false, false),
    ("GET", "/api/v1/pods?watch=true;x=1", false, false),
    ("GET", "/api/v1/pods?a;b&watch=true", true, false),
    ("GET", "/api/v1/pods?allowWatchBookmarks=true&watch=true", true, false),
    ("GET", "/api/v1/pods?watch=true&timeoutSeconds=abc", true, false),
    ("GET", "/api/v1/pods?watch=false&timeoutSeconds=abc", false, false),
    ("GET", "/api/v1/pods?labelSelector=watch%3Dtrue", false, false),
    ("GET", "/api/v1/pods?labelSelector=x&watch=true&fieldSelector=metadata.name%3Dfoo", true, false),
    ("GET", "/api/v1/pods?fieldSelector=%zz&watch=true", true, false),
    ("GET", "/api/v1/pods?fieldSelector=a%3D%3D%3Db&watch=true", true, false),
    ("GET", "/api/v1/pods", false, false),
    ("GET", "/api/v1/pods/?watch=true", true, false),
    ("GET", "/api/v1//pods?watch=true", false, false),
    ("GET", "//api/v1/pods?watch=true", true, false),
    ("GET", "/api/v1/pods//?watch=true", true, false),
    ("GET", "/api/v1/pods//log?watch=true", true, false),
    ("GET", "/api/v1/pods/x?watch=true", false, false),
    ("GET", "/api/v1/pods/x/log?watch=true", false, false),
    ("GET", "/api/v1/namespaces?watch=true", true, false),
    ("GET", "/api/v1/namespaces/watch?watch=true", false, false),
    ("GET", "/api/v1/namespaces/a/status?watch=true", false, false),
    ("GET", "/api/v1/namespaces/a/finalize?watch=true", false, false),
    ("GET", "/api/v1/namespaces/a/finalize/x?watch=true", false, false),
    ("GET", "/api/v1/namespaces/watch", false, false),
    ("GET", "/api/v1/namespaces/watch/pods", false, false),
    ("GET", "/api/v1/namespaces/watch/pods?watch=true", true, false),
    ("GET", "/api/v1/namespaces/watch/pods/p:18080/proxy/export.jsonl", false, false),
    ("GET", "/api/v1/namespaces/shop/pods/p:18080/proxy/v3/watch/prices", false, false),
    ("GET", "/api/v1/namespaces/shop/pods/p:18080/proxy/report?watch=true", false, false),
    ("GET", "/api/v1/namespaces/shop/services/watch/proxy/watch/x?watch=true", false, false),
    ("GET", "/api/v1/nodes/n?watch=true", false, false),
    ("GET", "/api/v1/nodes/n/proxy/watch/x", false, false),
    ("GET", "/api/v1/watch/pods", true, false),
    ("GET", "/api/v1/watch/namespaces/a/pods", true, false),
    ("GET", "/api/v1/watch/namespaces/a/pods/x", true, false),
    ("GET", "/api/v1/watch/namespaces/a/pods/x/log", true, false),
    ("GET", "/api/v1/watch", false, false),
    ("GET", "/api/v1/watch/", false, false),
    ("GET", "/api/v1/watch/pods?watch=false", true, false),
    ("POST", "/api/v1/watch/pods", true, false),
    ("HEAD", "/api/v1/watch/pods", true, false),
    ("DELETE", "/api/v1/watch/pods", true, false),
    ("POST", "/api/v1/pods?watch=true", false, false),
    ("DELETE", "/api/v1/pods?watch=true", false, false),
    ("HEAD", "/api/v1/pods?watch=true", true, false),
    ("OPTIONS", "/api/v1/pods?watch=true", false, false),
    ("get", "/api/v1/pods?watch=true", false, false),
    ("GET", "/api/v1/proxy/nodes/n?watch=true", false, false),
    ("GET", "/api/v1/proxy/nodes?watch=true", false, false),
    ("GET", "/api/v1/proxy/watch/x?watch=true", false, false),
    ("GET", "/api/v1/proxy?watch=true", false, false),
    ("GET", "/apis/apps/v1/deployments?watch=true", true, false),
    ("GET", "/apis/apps/v1/watch/deployments", true, false),
    ("GET", "/apis/apps/v1/namespaces/a/deployments?watch=true", true, false),
    ("GET", "/apis/apps/v1/namespaces/a/deployments/x?watch=true", false, false),
    ("GET", "/apis/apps/v1/namespaces/a/deployments/x/scale?watch=true", false, false),
    ("GET", "/apis/watch/v1/deployments", false, false),
    ("GET", "/apis/watch/v1/watch/deployments", true, false),
    ("GET", "/apis/apps/watch/deployments", false, false),
    ("GET", "/apis/apps/v1?watch=true", false, false),
    ("GET", "/apis/apps/v1/watch", false, false),
    ("GET", "/apis?watch=true", false, false),
    ("GET", "/api?watch=true", false, false),
    ("GET", "/api/v1?watch=true", false, false),
    ("GET", "/api/watch/pods", false, false),
    ("GET", "/api/watch/pods?watch=true", true, false),
    ("GET", "/watch/api/v1/pods", false, false),
    ("GET", "/metrics?watch=true", false, false),
    ("GET", "/logs/watch/x", false, false),
    ("GET", "/apix/v1/pods?watch=true", false, false),
    ("GET", "/API/v1/pods?watch=true", false, false),
    ("GET", "/%61pi/v1/pods?watch=true", true, false),
    ("GET", "/api/v1/pods%2Fx?watch=true", false, false),
    ("GET", "/api/v1/%77atch/pods", true, false),
    ("GET", "/api/v1/namespaces%2Fa%2Fpods?watch=true", true, false),
    ("GET", "/api/v1/customwatch/pods", false, false),
    ("GET", "/api/v1/pods?watch=true&sendInitialEvents=true", true, true),
    ("GET", "/api/v1/pods?watch=true&sendInitialEvents=false", true, false),
    ("GET", "/api/v1/pods?watch=true&sendInitialEvents", true, true),
    ("GET", "/api/v1/pods?watch=true&sendInitialEvents=0", true, false),
    ("GET", "/api/v1/pods?watch=true&x=sendInitialEvents", true, false),
    ("GET", "/api/v1/watch/pods?sendInitialEvents=True", true, true),
    ("GET", "https://host/api/v1/pods?watch=true", true, false),
    ("GET", "*", false, false),
];

#[test]
fn a_watch_is_what_request_info_says_it_is() {
    for (method, target, is_watch, initial_events) in REQUEST_INFO {
        let watch = Watch::of(method.as_bytes(), target.as_bytes());
        assert_eq!(watch.is_some(), *is_watch, "{method} {target}");
        let is_marked = watch.is_some_and(|watch| watch.beginning == Beginning::MarkedState);
        assert_eq!(is_marked, *initial_events, "{method} {target}");
    }
}

#[test]
fn only_a_version_that_is_named_and_not_zero_begins_with_changes() {
    for (query, expected) in [
        ("", Beginning::State),
        ("&resourceVersion", Beginning::State),
        ("&resourceVersion=", Beginning::State),
        ("&resourceVersion=0", Beginning::State),
        ("&resourceVersion=00", Beginning::State),
        ("&resourceVersion=%30", Beginning::State),
        ("&resourceVersion=0&resourceVersion=5", Beginning::State),
        ("&resourceVersion=x", Beginning::State),
        ("&resourceVersion=-1", Beginning::State),
        ("&resourceversion=5", Beginning::State),
        ("&labelSelector=resourceVersion%3D5", Beginning::State),
        ("&resourceVersion=0&resourceVersionMatch=NotOlderThan", Beginning::State),
        ("&resourceVersion=5", Beginning::Changes),
        ("&resourceVersion=%35", Beginning::Changes),
        ("&resourceVersion=010", Beginning::Changes),
        ("&sendInitialEvents=false&resourceVersion=5", Beginning::Changes),
        ("&sendInitialEvents=false", Beginning::State),
        ("&sendInitialEvents=true&resourceVersion=5", Beginning::MarkedState),
        ("&sendInitialEvents=true", Beginning::MarkedState),
    ] {
        for path in ["/api/v1/pods?watch=1", "/api/v1/watch/pods?a=b"] {
            let target = format!("{path}{query}");
            let watch = Watch::of(b"GET", target.as_bytes()).expect("a watch");
            assert_eq!(watch.beginning, expected, "{target}");
        }
    }
}
