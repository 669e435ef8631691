#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_accel_fuzz::cpu::guest(data));
