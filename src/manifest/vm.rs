//! [`VmConfig`]: the guest's configuration in a manifest, which is most of its text and seldom needed.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

/// The guest's configuration as QEMU reports it. What was read stays text until somebody looks at it: a long chain
/// has one in each manifest, and a backup looks at those of the newest points only. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct VmConfig(Arc<Config>);

#[derive(Debug, Default)]
struct Config {
    /// As it was read; written again byte by byte.
    text: Option<Box<RawValue>>,
    value: OnceLock<Value>,
}

impl Deref for VmConfig {
    type Target = Value;

    /// What it says; `Null` where that cannot be told (a text that is nested too deeply).
    fn deref(&self) -> &Value {
        let parse = || self.0.text.as_ref().and_then(|t| serde_json::from_str(t.get()).ok());
        self.0.value.get_or_init(|| parse().unwrap_or_default())
    }
}

impl From<Value> for VmConfig {
    fn from(value: Value) -> Self {
        VmConfig(Arc::new(Config { text: None, value: OnceLock::from(value) }))
    }
}

impl PartialEq for VmConfig {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<'de> Deserialize<'de> for VmConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Some(Box::<RawValue>::deserialize(deserializer)?);
        Ok(VmConfig(Arc::new(Config { text, value: OnceLock::new() })))
    }
}

impl Serialize for VmConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0.text {
            Some(text) => text.serialize(serializer),
            None => Value::serialize(self, serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_looked_at_late_and_written_as_it_was() {
        let text =
            "{\n  \"query-name\": {\"name\": \"vm\"},  \"big\": 123456789012345678901234567890 }";
        let read: VmConfig = serde_json::from_str(text).unwrap();
        assert!(read.0.value.get().is_none());
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert!(read.0.value.get().is_none());
        assert_eq!(read["query-name"]["name"], "vm");
        let made = VmConfig::from(serde_json::json!({ "a": [1, null] }));
        assert_eq!(serde_json::to_string(&made).unwrap(), r#"{"a":[1,null]}"#);
        assert_eq!(made, serde_json::from_str(r#"{ "a" : [1, null] }"#).unwrap());
        assert_eq!(serde_json::to_value(&read).unwrap()["query-name"]["name"], "vm");
    }

    #[test]
    fn nothing_is_null_and_nested_too_deeply_too() {
        assert!(VmConfig::default().is_null());
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let read: VmConfig = serde_json::from_str(&deep).unwrap();
        assert!(read.is_null());
        assert!(serde_json::from_str::<VmConfig>("{\"a\": ]}").is_err());
    }
}
