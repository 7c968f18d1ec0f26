/work/main/fuzz/target/debug/deps/client_hello-a459daaceeb95e76.d: targets/client_hello.rs

/work/main/fuzz/target/debug/deps/libclient_hello-a459daaceeb95e76.rmeta: targets/client_hello.rs

targets/client_hello.rs:
