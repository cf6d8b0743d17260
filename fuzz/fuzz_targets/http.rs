#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| moe_hot_fuzz::http::run(data));
