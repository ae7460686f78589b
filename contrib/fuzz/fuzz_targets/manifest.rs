//! Manifests from hostile bytes: read or refused, never a panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = fleecefs::manifest::parse(bytes) else { return };
    let _ = manifest.state_time(Some(manifest.time));
    let text = serde_json::to_vec(&manifest).expect("what was read can be written");
    let again = fleecefs::manifest::parse(&text).expect("what was written can be read");
    assert_eq!(again, manifest);
});
