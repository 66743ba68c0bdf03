//! What is read of a domain's XML: what libvirt calls its disks, and whether it has a guest agent.
//!
//! Only tags are looked at, each by the path that leads to it; texts, comments and what else XML has are passed over.
//! libvirt writes what it has read and checked itself, so more is not needed, but for the bounds.

use super::Malformed;
use std::collections::BTreeMap;

/// Deepest nesting that is followed. A domain's own elements are some ten deep; `metadata` may hold others'.
const DEPTH_CAP: usize = 256;

/// The channel that a guest agent answers on.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// What a domain is made of, as far as it is needed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Definition {
    /// What libvirt calls each disk, such as `vda`, by the id of its device in QEMU, such as `virtio-disk0`.
    pub disks: BTreeMap<String, String>,
    /// Its guest agent.
    pub agent: Agent,
}

/// What is known of the guest agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Agent {
    /// The domain has no channel for one
    #[default]
    None,
    /// Nobody in the guest answers on it
    Disconnected,
    /// One is there
    Connected,
}

impl Definition {
    /// Reads `xml`, as libvirt wrote it.
    ///
    /// # Errors
    /// Where it is none.
    pub fn read(xml: &str) -> Result<Self, Malformed> {
        let mut read = Self::default();
        let (mut path, mut disk) = (Vec::new(), Disk::default());
        for tag in Tags(xml) {
            let tag = tag?;
            match tag.kind {
                Kind::Close => {
                    if path.pop() != Some(tag.name) {
                        return Err(Malformed::Unknown);
                    }
                    if (&path[..], tag.name) == (&["domain", "devices"], "disk") {
                        read.add(std::mem::take(&mut disk));
                    }
                    continue;
                }
                Kind::Open if path.len() == DEPTH_CAP => return Err(Malformed::TooLong),
                Kind::Open | Kind::Whole => {}
            }
            match &path[..] {
                ["domain", "devices", "disk"] => disk.see(&tag),
                ["domain", "devices", "channel"] if tag.name == "target" => {
                    read.see_channel(&tag);
                }
                _ => {}
            }
            if let Kind::Open = tag.kind {
                path.push(tag.name);
            }
        }
        match path.is_empty() {
            true => Ok(read),
            false => Err(Malformed::Short),
        }
    }

    fn add(&mut self, disk: Disk<'_>) {
        if let (Some(device), Some(target)) = (disk.alias, disk.target) {
            self.disks.insert(device.into(), target.into());
        }
    }

    fn see_channel(&mut self, target: &Tag<'_>) {
        if target.attribute("name") == Some(AGENT_CHANNEL) {
            self.agent = match target.attribute("state") {
                Some("connected") => Agent::Connected,
                _ => Agent::Disconnected,
            };
        }
    }
}

#[derive(Default)]
struct Disk<'a> {
    alias: Option<&'a str>,
    target: Option<&'a str>,
}

impl<'a> Disk<'a> {
    fn see(&mut self, tag: &Tag<'a>) {
        match tag.name {
            "alias" => self.alias = tag.attribute("name"),
            "target" => self.target = tag.attribute("dev"),
            _ => {}
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Open,
    Close,
    /// Open and closed at once.
    Whole,
}

#[derive(Debug)]
struct Tag<'a> {
    kind: Kind,
    name: &'a str,
    attributes: &'a str,
}

impl<'a> Tag<'a> {
    /// The value as it is written; those that are asked for need no escapes.
    fn attribute(&self, name: &str) -> Option<&'a str> {
        let mut rest = self.attributes;
        loop {
            let (key, after) = rest.split_once('=')?;
            let after = after.trim_start();
            let quote = after
                .chars()
                .next()
                .filter(|quote| "'\"".contains(*quote))?;
            let (value, after) = after.get(1..)?.split_once(quote)?;
            if key.trim() == name {
                return Some(value);
            }
            rest = after;
        }
    }
}

/// The tags of a document, one after the other.
struct Tags<'a>(&'a str);

impl<'a> Iterator for Tags<'a> {
    type Item = Result<Tag<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        /// What is no tag, from its beginning to its end.
        const OTHERS: [(&str, &str); 4] = [
            ("<!--", "-->"),
            ("<![CDATA[", "]]>"),
            ("<?", "?>"),
            ("<!", ">"),
        ];
        'text: loop {
            self.0 = self.0.get(self.0.find('<')?..)?;
            for (begin, end) in OTHERS {
                if let Some(inside) = self.0.strip_prefix(begin) {
                    let Some((_, after)) = inside.split_once(end) else {
                        return Some(Err(self.give_up()));
                    };
                    self.0 = after;
                    continue 'text;
                }
            }
            return Some(self.tag().ok_or_else(|| self.give_up()));
        }
    }
}

impl<'a> Tags<'a> {
    fn give_up(&mut self) -> Malformed {
        self.0 = "";
        Malformed::Short
    }

    fn tag(&mut self) -> Option<Tag<'a>> {
        let inside = self.0.strip_prefix('<')?;
        let end = end_of_tag(inside)?;
        let (inside, after) = inside.split_at_checked(end)?;
        self.0 = after.strip_prefix('>')?;
        let (kind, inside) = match (inside.strip_prefix('/'), inside.strip_suffix('/')) {
            (Some(inside), _) => (Kind::Close, inside),
            (_, Some(inside)) => (Kind::Whole, inside),
            _ => (Kind::Open, inside),
        };
        let inside = inside.trim_end();
        let (name, attributes) = inside
            .split_once(|c: char| c.is_ascii_whitespace())
            .unwrap_or((inside, ""));
        Some(Tag {
            kind,
            name,
            attributes,
        })
    }
}

/// Where the `>` is that is not in quotes.
fn end_of_tag(inside: &str) -> Option<usize> {
    let mut quote = None;
    inside.bytes().position(|byte| match (quote, byte) {
        (Some(open), _) if open == byte => {
            quote = None;
            false
        }
        (Some(_), _) => false,
        (None, b'\'' | b'"') => {
            quote = Some(byte);
            false
        }
        (None, byte) => byte == b'>',
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DOMAIN: &str = r#"<?xml version='1.0'?>
<!-- <domain><devices><disk><alias name='no'/><target dev='no'/></disk></devices></domain> -->
<domain type='kvm' id='3'>
  <name>web</name>
  <metadata><x:own xmlns:x="u" a="1 > 0"><disk><alias name='not-this'/><target dev='nor-this'/></disk>
    <![CDATA[</domain>]]></x:own></metadata>
  <devices>
    <disk type='file' device='disk'>
      <source file='/a'><slices><slice type='storage' offset='0'/></slices></source>
      <backingStore type='file'><format type='raw'/><source file='/b'/></backingStore>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='cdrom'><target dev="sda" bus="sata"/><alias name="sata0-0-0"/></disk>
    <disk type='block'><target dev='sdz' bus='scsi'/></disk>
    <channel type='unix'><source mode='bind'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/><alias name='channel0'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0' state='disconnected'/></channel>
  </devices>
</domain>
"#;

    #[test]
    fn disks_have_the_names_of_their_targets_and_the_agent_is_known() {
        let read = Definition::read(DOMAIN).unwrap();
        let disk = |device: &str| read.disks.get(device).map(String::as_str);
        assert_eq!(disk("virtio-disk0"), Some("vda"));
        assert_eq!(disk("sata0-0-0"), Some("sda"));
        assert_eq!(read.disks.len(), 2);
        assert_eq!(read.agent, Agent::Connected);
        let gone = DOMAIN.replace("state='connected'", "state='disconnected'");
        assert_eq!(Definition::read(&gone).unwrap().agent, Agent::Disconnected);
        assert_eq!(
            Definition::read("<domain/>").unwrap(),
            Definition::default()
        );
    }

    #[test]
    fn what_is_cut_off_or_crossed_is_refused() {
        for wrong in [
            "<domain>",
            "<domain><devices></domain></devices>",
            "<domain a='",
            "<!-- ",
            "</domain>",
        ] {
            assert!(Definition::read(wrong).is_err(), "{wrong}");
        }
        let deep = "<a>".repeat(DEPTH_CAP + 1);
        assert_eq!(Definition::read(&deep), Err(Malformed::TooLong));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,300}", cut in 0usize..2000) {
            let _ = Definition::read(&text);
            let _ = Definition::read(&format!("<domain><devices>{text}"));
            let cut = DOMAIN.get(..cut.min(DOMAIN.len())).unwrap_or_default();
            let _ = Definition::read(&format!("{cut}{text}"));
        }
    }
}
