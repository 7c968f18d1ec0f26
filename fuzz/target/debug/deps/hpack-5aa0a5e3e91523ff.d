/work/main/fuzz/target/debug/deps/hpack-5aa0a5e3e91523ff.d: targets/hpack.rs

/work/main/fuzz/target/debug/deps/libhpack-5aa0a5e3e91523ff.rmeta: targets/hpack.rs

targets/hpack.rs:
