//! The VM as libvirt's domain XML, for copying: overlays over the layer files, whose whole chain is spelled out.

use std::fmt::Write;

use super::command::overlay_name;
use super::vm::{Accel, Net, Vm, VmDisk};
use crate::error::{Error, Kind, Result};
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::machine::{Bus, ScsiModel};

/// Names of devices have one letter.
const MOST: usize = 26;

/// The domain, with an overlay for each disk in `folder`, over the layers `stacks` (bottom first), in the order of
/// [`Vm::sources`].
///
/// # Errors
/// `Unsupported` if libvirt has no word for one of them; a name with characters that XML does not have.
pub(crate) fn domain(vm: &Vm, stacks: &[Vec<LayerSpec>], folder: &str) -> Result<String> {
    if vm.disks.len() > MOST {
        return Err(Error::new(Kind::Unsupported, "more disks than have names in the XML"));
    }
    let mut xml = String::new();
    let kind = if vm.accel == Accel::Kvm { "kvm" } else { "qemu" };
    line(&mut xml, 0, &format!("<domain type='{kind}'>"));
    line(&mut xml, 1, "<name>fleecefs-boot</name>");
    line(&mut xml, 1, &format!("<uuid>{}</uuid>", escaped(&vm.uuid)?));
    line(&mut xml, 1, &format!("<memory unit='MiB'>{}</memory>", vm.memory >> 20));
    line(&mut xml, 1, &format!("<vcpu>{}</vcpu>", vm.cpus));
    os(&mut xml, vm)?;
    let smm = vm.uefi.as_ref().is_some_and(|u| u.smm);
    let smm = if smm { "<smm state='on'/>" } else { "" };
    line(&mut xml, 1, &format!("<features><acpi/><apic/>{smm}</features>"));
    let cpu = match vm.cpu.as_str() {
        "host" => "<cpu mode='host-passthrough'/>".to_string(),
        "max" => "<cpu mode='maximum'/>".into(),
        // As QEMU by itself: a feature of the model that this processor lacks is no reason not to start.
        model => {
            format!("<cpu mode='custom' check='none'><model>{}</model></cpu>", escaped(model)?)
        }
    };
    line(&mut xml, 1, &cpu);
    line(&mut xml, 1, "<devices>");
    for (number, stack) in stacks.iter().take(vm.disks.len()).enumerate() {
        disk(&mut xml, vm, number, stack, folder)?;
    }
    scsi(&mut xml, vm)?;
    nics(&mut xml, vm)?;
    line(&mut xml, 2, "<serial type='pty'/>");
    line(&mut xml, 2, "<graphics type='vnc' listen='127.0.0.1'/>");
    line(
        &mut xml,
        2,
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
    );
    line(&mut xml, 1, "</devices>");
    line(&mut xml, 0, "</domain>");
    Ok(xml)
}

fn line(xml: &mut String, depth: usize, text: &str) {
    // A String takes all.
    let _ = writeln!(xml, "{:1$}{text}", "", depth * 2);
}

fn os(xml: &mut String, vm: &Vm) -> Result<()> {
    line(xml, 1, "<os>");
    line(xml, 2, &format!("<type arch='x86_64' machine='{}'>hvm</type>", vm.chipset.name()));
    if let Some(uefi) = &vm.uefi {
        if uefi.vars.is_some() {
            let what =
                "libvirt takes variables of UEFI as a file only, and they are in a backup here";
            return Err(Error::new(Kind::Unsupported, what).remedy("restore them, or use --print"));
        }
        let path = |p: &std::path::Path| {
            let text = p.to_str().ok_or_else(|| not_text(p))?;
            escaped(text)
        };
        let secure = if uefi.smm { " secure='yes'" } else { "" };
        let (code, vars) = (path(&uefi.files.code)?, path(&uefi.files.vars)?);
        line(xml, 2, &format!("<loader readonly='yes'{secure} type='pflash'>{code}</loader>"));
        line(xml, 2, &format!("<nvram template='{vars}'/>"));
    }
    if let Some(kernel) = &vm.kernel {
        let text = |p: &std::path::Path| escaped(p.to_str().ok_or_else(|| not_text(p))?);
        line(xml, 2, &format!("<kernel>{}</kernel>", text(&kernel.kernel)?));
        if let Some(initrd) = &kernel.initrd {
            line(xml, 2, &format!("<initrd>{}</initrd>", text(initrd)?));
        }
        line(xml, 2, &format!("<cmdline>{}</cmdline>", escaped(&kernel.append)?));
    }
    line(xml, 1, "</os>");
    Ok(())
}

fn disk(xml: &mut String, vm: &Vm, number: usize, stack: &[LayerSpec], folder: &str) -> Result<()> {
    let disk = &vm.disks[number];
    let letter = char::from(b'a' + u8::try_from(number).unwrap_or(0));
    let (bus, prefix) = match disk.bus {
        Bus::Virtio | Bus::Flash => ("virtio", "vd"),
        Bus::Scsi(_) => ("scsi", "sd"),
        Bus::Sata => ("sata", "sd"),
        Bus::Ide => ("ide", "hd"),
        Bus::Usb => ("usb", "sd"),
        Bus::Nvme => {
            let what = "libvirt has no NVMe disks of files";
            return Err(Error::new(Kind::Unsupported, what).remedy("use another bus: --bus"));
        }
    };
    line(xml, 2, "<disk type='file' device='disk'>");
    line(xml, 3, "<driver name='qemu' type='qcow2' discard='unmap'/>");
    let overlay = escaped(&format!("{folder}/{}", overlay_name(number)))?;
    line(xml, 3, &format!("<source file='{overlay}'/>"));
    for (depth, layer) in stack.iter().rev().enumerate() {
        backing(xml, 3 + depth, layer)?;
    }
    line(xml, 3 + stack.len(), "<backingStore/>");
    for depth in (0..stack.len()).rev() {
        line(xml, 3 + depth, "</backingStore>");
    }
    line(xml, 3, &format!("<target dev='{prefix}{letter}' bus='{bus}'/>"));
    if let Some(serial) = &disk.serial {
        line(xml, 3, &format!("<serial>{}</serial>", escaped(serial)?));
    }
    line(xml, 3, &format!("<boot order='{}'/>", disk.boot_index + 1));
    line(xml, 2, "</disk>");
    Ok(())
}

/// The beginning of a layer's element; what is below comes inside.
fn backing(xml: &mut String, depth: usize, layer: &LayerSpec) -> Result<()> {
    let format = match (layer.format, &layer.part, &layer.data_file) {
        (Format::Qcow2, LayerPart::Whole, None) => "qcow2",
        (Format::Raw, LayerPart::Whole, None) => "raw",
        _ => {
            let what = "libvirt cannot read this by itself";
            let error = Error::new(Kind::Unsupported, what).at_path(layer.file.path());
            return Err(error.remedy("boot it, or mount it"));
        }
    };
    let path = layer.file.path();
    let name = escaped(path.to_str().ok_or_else(|| not_text(path))?)?;
    line(xml, depth, "<backingStore type='file'>");
    line(xml, depth + 1, &format!("<format type='{format}'/>"));
    // libvirt gives files of running VMs another owner and label: not those of a backup.
    let stays =
        ["dac", "selinux"].map(|m| format!("<seclabel model='{m}' relabel='no'/>")).concat();
    line(xml, depth + 1, &format!("<source file='{name}'>{stays}</source>"));
    Ok(())
}

/// The controller of SCSI disks: libvirt takes another model where none is said.
fn scsi(xml: &mut String, vm: &Vm) -> Result<()> {
    let model = |d: &VmDisk| match d.bus {
        Bus::Scsi(model) => Some(model),
        _ => None,
    };
    let mut models = vm.disks.iter().filter_map(model);
    let Some(first) = models.next() else { return Ok(()) };
    if models.any(|m| m != first) {
        let what = "SCSI disks on controllers of several models";
        return Err(Error::new(Kind::Unsupported, what).remedy("use another bus: --bus"));
    }
    let name = match first {
        ScsiModel::Virtio => "virtio-scsi",
        ScsiModel::Lsi => "lsilogic",
        ScsiModel::Megasas => "lsisas1078",
        ScsiModel::Mptsas => "lsisas1068",
        ScsiModel::Pvscsi => "vmpvscsi",
    };
    line(xml, 2, &format!("<controller type='scsi' index='0' model='{name}'/>"));
    Ok(())
}

fn nics(xml: &mut String, vm: &Vm) -> Result<()> {
    if vm.net == Net::Isolated {
        let what = "libvirt's user networks are not isolated";
        return Err(Error::new(Kind::Unsupported, what).remedy("use --net none or user"));
    }
    for nic in &vm.nics {
        let (mac, model) = (escaped(&nic.mac)?, nic.model.name().trim_end_matches("-net-pci"));
        let text = format!(
            "<interface type='user'><mac address='{mac}'/><model type='{model}'/></interface>"
        );
        line(xml, 2, &text);
    }
    Ok(())
}

fn not_text(path: &std::path::Path) -> Error {
    Error::new(Kind::Unsupported, "XML takes names in UTF-8 only").at_path(path)
}

/// A text for an element or an attribute.
///
/// # Errors
/// It has a character that XML 1.0 does not have, or that would not come back: attributes have no line breaks.
fn escaped(text: &str) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '\'' => out += "&apos;",
            '"' => out += "&quot;",
            '\0'..='\u{1f}' | '\u{7f}' | '\u{fffe}' | '\u{ffff}' => {
                let what = "the name has a character that XML does not have";
                return Err(Error::new(Kind::Unsupported, what).at_path(text));
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::vm::tests::plain;
    use super::*;
    use crate::storage::SourceFile;

    fn layers(names: &[&str]) -> (tempfile::TempDir, Vec<LayerSpec>) {
        let dir = tempfile::tempdir().unwrap();
        let layer = |name: &&str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "x").unwrap();
            let file = Arc::new(SourceFile::look(&path).unwrap());
            LayerSpec { file, format: Format::Qcow2, part: LayerPart::Whole, data_file: None }
        };
        let all = names.iter().map(layer).collect();
        (dir, all)
    }

    #[test]
    fn the_whole_chain_is_spelled_out_and_names_stay_names() {
        let (dir, stack) = layers(&["FULL-1-a", "INC'2 <&> \"x\""]);
        let xml = domain(&plain(1), &[stack], "/tmp/o").unwrap();
        let dir = dir.path().to_str().unwrap();
        let name = format!("<source file='{dir}/INC&apos;2 &lt;&amp;&gt; &quot;x&quot;'>");
        let (inc, full) = (xml.find(&name).unwrap(), xml.find("FULL-1-a").unwrap());
        assert!(inc < full && xml.find("<backingStore/>").unwrap() > full, "{xml}");
        assert_eq!(
            xml.matches("<backingStore type").count(),
            xml.matches("</backingStore>").count()
        );
        assert!(xml.contains("<source file='/tmp/o/fleecefs-boot-0.qcow2'/>"), "{xml}");
    }

    /// libvirt refuses a model of which the processor lacks a feature (qemu64 has svm, which Intel's do not); QEMU does not.
    #[test]
    fn a_processor_model_is_taken_as_far_as_there_is_one() {
        let (_dir, stack) = layers(&["FULL-1-a"]);
        let vm = Vm { cpu: "qemu64".into(), ..plain(1) };
        let xml = domain(&vm, &[stack], "/tmp/o").unwrap();
        assert!(xml.contains("<cpu mode='custom' check='none'><model>qemu64</model>"), "{xml}");
    }

    #[test]
    fn what_xml_does_not_have_is_refused() {
        let (_dir, stack) = layers(&["a\nb"]);
        assert_eq!(domain(&plain(1), &[stack], "/t").unwrap_err().kind(), Kind::Unsupported);
    }

    proptest! {
        #[test]
        fn an_escaped_text_has_no_marks_and_comes_back(text in "[ -~\u{a0}-\u{2ff}]{0,40}") {
            let out = escaped(&text).unwrap();
            prop_assert!(!out.contains(['<', '>', '\'', '"']));
            let back = out.replace("&lt;", "<").replace("&gt;", ">").replace("&apos;", "'")
                .replace("&quot;", "\"").replace("&amp;", "&");
            prop_assert_eq!(back, text);
        }
    }
}
