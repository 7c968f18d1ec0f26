/work/main/fuzz/target/debug/deps/proxy_protocol-303567a07f0f095f.d: targets/proxy_protocol.rs

/work/main/fuzz/target/debug/deps/libproxy_protocol-303567a07f0f095f.rmeta: targets/proxy_protocol.rs

targets/proxy_protocol.rs:
