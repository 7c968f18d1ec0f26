/work/main/fuzz/target/debug/deps/relay-bd3a7562826a26a4.d: targets/relay.rs

/work/main/fuzz/target/debug/deps/librelay-bd3a7562826a26a4.rmeta: targets/relay.rs

targets/relay.rs:
