//! What this QEMU can do, asked from itself by `query-qmp-schema`, never guessed from its version.

use super::monitor::{Monitor, MonitorError};
use serde::Deserialize;
use serde_json::json;
use std::collections::{HashMap, HashSet};

/// Commands and their arguments.
#[derive(Debug, Default)]
pub struct Schema {
    /// Command → the name of the object type of its arguments.
    commands: HashMap<String, String>,
    /// Object type → its members.
    objects: HashMap<String, HashSet<String>>,
    /// Union and case → the object type that the case adds.
    variants: HashMap<(String, String), String>,
}

/// One `SchemaInfo` of QEMU's qapi/introspect.json, as far as it matters here.
#[derive(Deserialize)]
struct Entity {
    name: String,
    #[serde(rename = "meta-type")]
    meta_type: String,
    #[serde(rename = "arg-type", default)]
    arg_type: String,
    /// Of an object these are records; of other entities they are something else.
    #[serde(default)]
    members: serde_json::Value,
    /// Of a union.
    #[serde(default)]
    variants: serde_json::Value,
}

impl Schema {
    /// Asks QEMU.
    ///
    /// # Errors
    /// Those of [`Monitor::query`].
    pub async fn probe(monitor: &Monitor) -> Result<Self, MonitorError> {
        Ok(Self::of(
            monitor.query("query-qmp-schema", json!({})).await?,
        ))
    }

    fn of(entities: Vec<Entity>) -> Self {
        let mut schema = Self::default();
        for entity in entities {
            match entity.meta_type.as_str() {
                "command" => {
                    schema.commands.insert(entity.name, entity.arg_type);
                }
                "object" => {
                    for variant in entity.variants.as_array().into_iter().flatten() {
                        let text = |member: &str| Some(variant.get(member)?.as_str()?.to_owned());
                        if let (Some(case), Some(object)) = (text("case"), text("type")) {
                            schema.variants.insert((entity.name.clone(), case), object);
                        }
                    }
                    let members = entity.members.as_array().into_iter().flatten();
                    let names = members.filter_map(|m| Some(m.get("name")?.as_str()?.to_owned()));
                    schema.objects.insert(entity.name, names.collect());
                }
                _ => {}
            }
        }
        schema
    }

    /// Whether QEMU knows the command.
    pub fn has_command(&self, name: &str) -> bool {
        self.commands.contains_key(name)
    }

    /// Whether the command takes `member` whatever its other arguments are: members that only one
    /// variant of a union has do not count.
    pub fn command_has_argument(&self, command: &str, member: &str) -> bool {
        self.commands
            .get(command)
            .and_then(|arguments| self.objects.get(arguments))
            .is_some_and(|members| members.contains(member))
    }

    /// Whether the command, whose arguments are a union, knows that case of it: `blockdev-add` and a driver.
    pub fn has_variant(&self, command: &str, case: &str) -> bool {
        let union = self.commands.get(command);
        union.is_some_and(|union| {
            let variant = (union.clone(), case.to_owned());
            self.variants.contains_key(&variant)
        })
    }

    /// Whether the command, whose arguments are a union, takes `member` in that case of it: `blockdev-add` with an
    /// option that one driver has.
    pub fn variant_has_option(&self, command: &str, case: &str, member: &str) -> bool {
        self.commands
            .get(command)
            .and_then(|union| self.variants.get(&(union.clone(), case.to_owned())))
            .and_then(|object| self.objects.get(object))
            .is_some_and(|members| members.contains(member))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_found_through_the_type_that_the_command_refers_to() {
        let schema = Schema::of(
            serde_json::from_value(json!([
                { "name": "blockdev-backup", "meta-type": "command", "arg-type": "19", "ret-type": "2" },
                { "name": "19", "meta-type": "object", "members": [{ "name": "target", "type": "str" }, { "name": "on-cbw-error", "default": null, "type": "7" }] },
                { "name": "7", "meta-type": "enum", "values": ["a"], "members": [{ "name": "a" }] },
                { "name": "target", "meta-type": "invented-later", "members": 5 },
            ]))
            .unwrap(),
        );
        assert!(schema.has_command("blockdev-backup"));
        assert!(!schema.has_command("target"));
        assert!(schema.command_has_argument("blockdev-backup", "on-cbw-error"));
        assert!(!schema.command_has_argument("blockdev-backup", "cbw-timeout"));
        assert!(!schema.command_has_argument("target", "target"));
        let schema = Schema::of(
            serde_json::from_value(json!([
                { "name": "blockdev-add", "meta-type": "command", "arg-type": "1" },
                { "name": "1", "meta-type": "object", "members": [{ "name": "driver" }], "tag": "driver", "variants": [{ "case": "raw", "type": "2" }, { "case": "copy-before-write", "type": "3" }, {}] },
                { "name": "2", "meta-type": "object", "members": [{ "name": "offset" }] },
                { "name": "3", "meta-type": "object", "members": [{ "name": "cbw-timeout" }] },
            ]))
            .unwrap(),
        );
        assert!(schema.has_variant("blockdev-add", "raw"));
        assert!(!schema.has_variant("blockdev-add", "vmdk"));
        assert!(!schema.has_variant("blockdev-del", "raw"));
        for (case, option, has) in [
            ("copy-before-write", "cbw-timeout", true),
            ("raw", "cbw-timeout", false),
            ("copy-before-write", "min-cluster-size", false),
            ("vmdk", "cbw-timeout", false),
        ] {
            assert_eq!(
                schema.variant_has_option("blockdev-add", case, option),
                has,
                "{case} {option}"
            );
        }
    }
}
