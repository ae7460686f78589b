use std::path::Path;

use serde_json::json;

use super::answers::{described_file, parse};
use super::*;
use crate::error::Kind;
use crate::qmp::types::{Graph, Job};

fn answers(drives: Value, nodes: Value) -> Answers {
    let graph = attached(&drives, &nodes);
    let drives = serde_json::from_value(drives).unwrap();
    Answers::of(drives, nodes, graph, true).unwrap()
}

/// A graph of these nodes without children, each device on what is inserted.
fn attached(drives: &Value, nodes: &Value) -> Graph {
    let name = |v: &Value| v["node-name"].as_str().unwrap_or_default().to_string();
    let mut names: Vec<String> = nodes.as_array().unwrap().iter().map(name).collect();
    let devices = drives.as_array().unwrap().iter().filter(|d| d["inserted"].is_object());
    names.extend(devices.clone().map(|d| name(&d["inserted"])));
    let mut vertices: Vec<Value> = names
        .iter()
        .enumerate()
        .map(|(id, n)| json!({"id": id, "type": "block-driver", "name": n}))
        .collect();
    let mut edges = Vec::new();
    for (n, d) in devices.enumerate() {
        let called = if d["device"] == "" { &d["qdev"] } else { &d["device"] };
        vertices.push(json!({"id": 100_000 + n, "type": "block-backend", "name": called}));
        let child = names.iter().position(|x| *x == name(&d["inserted"]));
        edges.push(json!({"parent": 100_000 + n, "child": child, "name": "root"}));
    }
    serde_json::from_value(json!({"nodes": vertices, "edges": edges})).unwrap()
}

fn qcow2(name: &str) -> Value {
    json!({"node-name": name, "drv": "qcow2", "ro": false, "file": format!("/vm/{name}.qcow2"),
        "image": {"virtual-size": 1048576, "cluster-size": 65536, "actual-size": 4096,
        "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "extended-l2": true}}}})
}

#[test]
fn disks_are_taken_and_media_are_left_out_with_a_reason() {
    let mut cd = qcow2("cd");
    cd["ro"] = true.into();
    let a = answers(
        json!([
            {"device": "", "qdev": "/m/v0/virtio-backend", "inserted": qcow2("d0")},
            {"device": "cd0", "qdev": "c", "removable": true, "inserted": cd},
            {"device": "empty", "qdev": "e", "removable": true},
            {"device": "loose", "inserted": qcow2("d1")}]),
        json!([qcow2("d0"), qcow2("d1")]),
    );
    let seen = survey(&a);
    assert_eq!(seen.disks.len(), 1);
    let d = &seen.disks[0];
    assert!(d.persistent && d.extended_l2 && !d.encrypted);
    assert_eq!(d.base_name(), "d0.qcow2");
    assert!(d.is_called("v0") && d.is_called("d0") && !d.is_called("d1"));
    assert_eq!(seen.skipped.len(), 3);
    assert_eq!(d.folder().unwrap(), Path::new("/vm"));
}

#[test]
fn a_disk_below_a_foreign_filter_is_in_the_way_and_not_left_out_by_rule() {
    let mut filter = qcow2("their-cbw");
    filter["drv"] = "copy-before-write".into();
    let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": filter.clone()}]);
    let seen = survey(&answers(drives, json!([filter, qcow2("d0")])));
    assert!(seen.skipped.is_empty() && seen.blocked.is_empty());
    assert!(seen.disks[0].busy.as_ref().unwrap().contains("--foreign"));
}

#[test]
fn what_stands_above_a_disk_is_named() {
    let node = |name: &str, driver: &str| json!({"node-name": name, "drv": driver});
    let look = |driver: &str, role: &str, jobs: Vec<Job>| {
        let nodes = json!([node("top", driver), qcow2("d0")]);
        let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": node("top", driver)}]);
        let mut a = answers(drives, nodes);
        a.jobs = jobs;
        a.graph = serde_json::from_value(json!({
            "nodes": [{"id": 1, "type": "block-backend", "name": "/m/v0"},
                {"id": 2, "type": "block-driver", "name": "top"},
                {"id": 3, "type": "block-driver", "name": "d0"},
                {"id": 4, "type": "block-job", "name": if a.jobs.is_empty() { "fleecefs-0123456789ab-j0" } else { "move" }}],
            "edges": [{"parent": 1, "child": 2, "name": "root"},
                {"parent": 2, "child": 3, "name": role}, {"parent": 4, "child": 2, "name": "main node"}]}))
        .unwrap();
        survey(&a)
    };
    for driver in ["quorum", "replication", "blkdebug", "blkverify"] {
        let seen = look(driver, "image", Vec::new());
        assert!(seen.blocked[0].reason.contains(driver), "{:?}", seen.blocked);
    }
    for driver in ["throttle", "copy-on-read", "compress", "blklogwrites", "preallocate"] {
        let seen = look(driver, "file", Vec::new());
        assert!(seen.disks[0].busy.is_none() && seen.disks[0].node == "d0", "{driver}");
        assert_eq!((seen.disks[0].top.as_str(), seen.disks[0].path.nodes.len()), ("top", 2));
    }
    let job = Job { id: "move".into(), kind: "mirror".into(), ..Default::default() };
    let seen = look("mirror_top", "backing", vec![job]);
    let d = &seen.disks[0];
    assert_eq!((d.node.as_str(), d.identity.format.as_str()), ("d0", "qcow2"));
    assert!(d.busy.as_ref().unwrap().starts_with("job move (mirror)"), "{:?}", d.busy);
    // Its job is not listed.
    let seen = look("mirror_top", "backing", Vec::new());
    assert!(seen.disks[0].busy.as_ref().unwrap().contains("mirror_top"));
    // Nobody knows what it is attached to.
    let mut a = answers(
        json!([{"device": "", "qdev": "/m/v0", "inserted": qcow2("d0")}]),
        json!([qcow2("d0")]),
    );
    a.graph = Graph::default();
    assert!(survey(&a).blocked[0].reason.contains("graph"));
}

#[test]
fn an_encrypted_backing_file_is_noticed_however_deep() {
    let seen = |a: &Answers| survey(a).disks[0].encrypted;
    let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": qcow2("top")}]);
    let mut base = qcow2("base");
    let nodes = |base: &Value| json!([qcow2("top"), qcow2("mid"), base]);
    let vertex = |id: u64, name: &str| json!({"id": id, "type": "block-driver", "name": name});
    let edge = |p: u64, c: u64, n: &str| json!({"parent": p, "child": c, "name": n});
    let graph = json!({
        "nodes": [vertex(1, "top"), vertex(2, "mid"), vertex(3, "base"),
            json!({"id": 4, "type": "block-backend", "name": "/m/v0"})],
        "edges": [edge(4, 1, "root"), edge(1, 2, "backing"), edge(2, 3, "backing"),
            edge(3, 1, "file")]});
    let make = |base: &Value| {
        let mut a = answers(drives.clone(), nodes(base));
        a.graph = serde_json::from_value(graph.clone()).unwrap();
        a
    };
    assert!(!seen(&make(&base)));
    base["drv"] = "luks".into();
    assert!(seen(&make(&base)));
    // Told in the image's description alone.
    let mut top = qcow2("top");
    top["image"]["backing-image"] = json!({"filename": "b", "encrypted": true});
    assert!(seen(&answers(drives.clone(), json!([top]))));
}

#[test]
fn descriptions_that_cannot_be_are_refused_and_nothing_overflows() {
    let long = "n".repeat(1 << 20);
    let change = |change: &dyn Fn(&mut Value)| {
        let mut d = qcow2("d0");
        change(&mut d);
        let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": d}]);
        survey(&answers(drives, json!([d])))
    };
    let refused: [&dyn Fn(&mut Value); 5] = [
        &|d| d["image"]["virtual-size"] = u64::MAX.into(),
        &|d| d["node-name"] = long.as_str().into(),
        &|d| d["drv"] = long.as_str().into(),
        &|d| d["file"] = long.as_str().into(),
        &|d| d["dirty-bitmaps"] = json!(vec![json!({"name": "b"}); 16_000]),
    ];
    for (n, r) in refused.into_iter().enumerate() {
        let seen = change(r);
        assert!(seen.disks.is_empty() && seen.blocked.len() == 1, "{n}");
        assert!(seen.blocked[0].disk.len() < 5000);
    }
    let seen = change(&|d| d["image"]["x"] = json!(vec![json!({}); 20_000]));
    assert!(seen.disks[0].info.is_null());
    let mut below = json!({"filename": "f", "virtual-size": u64::MAX});
    for _ in 0..50 {
        below = json!({"actual-size": u64::MAX, "backing-image": below});
    }
    let seen = change(&|d| {
        d["image"]["backing-image"] = below.clone();
        d["image"]["cluster-size"] = 0.into();
    });
    assert_eq!((seen.disks[0].allocated, seen.disks[0].cluster_size), (1 << 20, 65536));
    for odd in [json!(-1), json!("1"), json!(1.5), json!({}), json!(1e30)] {
        let mut d = qcow2("d0");
        d["image"]["virtual-size"] = odd;
        let parsed = Answers::of(Vec::new(), json!([d]), Graph::default(), true);
        assert_eq!(parsed.unwrap_err().kind(), Kind::Corrupt);
    }
}

#[test]
fn very_many_disks_and_nodes_take_bounded_time_and_memory() {
    let filter = |n: usize| json!({"node-name": format!("n{n}"), "drv": "throttle"});
    let drive = json!({"device": "", "qdev": "/m/v0", "inserted": filter(0)});
    let nodes = Value::Array((0..16_000).map(filter).collect());
    let mut a = answers(Value::Array(vec![drive; 16_000]), nodes);
    let vertex = |n| json!({"id": n, "type": "block-driver", "name": format!("n{n}")});
    let edge = |n: usize| json!({"parent": n, "child": (n + 1) % 16_000, "name": "file"});
    let device = json!({"id": 16_000, "type": "block-backend", "name": "/m/v0"});
    let root = json!({"parent": 16_000, "child": 0, "name": "root"});
    a.graph = serde_json::from_value(json!({
        "nodes": (0..16_000).map(vertex).chain([device]).collect::<Vec<_>>(),
        "edges": (0..16_000).map(edge).chain([root]).collect::<Vec<_>>()}))
    .unwrap();
    let seen = survey(&a);
    assert!(seen.count() <= DISKS + 1);
    assert!(parse::<Vec<Node>>(&json!(vec![json!({}); 16_385]), "x").is_err());
}

/// QEMU's node names change at each start: by them two RBD disks would change places.
#[test]
fn an_rbd_disk_is_known_by_its_image() {
    let rbd = json!({"node-name": "#block1", "drv": "rbd", "image": {"virtual-size": 1048576},
        "file": r#"json:{"pool": "disks", "image": "vm-1", "conf": "/c", "driver": "rbd"}"#});
    let wrapped = json!({"node-name": "#block2", "drv": "raw", "image": {"virtual-size": 1048576},
        "file": r#"json:{"driver": "raw", "file": {"pool": "disks", "image": "vm-1", "driver": "rbd"}}"#});
    for (node, child) in [(rbd.clone(), None), (wrapped, Some(rbd))] {
        let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": node}]);
        let nodes = json!([Some(node.clone()), child].into_iter().flatten().collect::<Vec<_>>());
        let seen = survey(&answers(drives, nodes));
        assert_eq!(seen.disks[0].identity.file, "rbd:disks/vm-1");
        assert_eq!(seen.disks[0].base_name(), "vm-1");
        // No folder of the host: its fleece is beside the backup.
        assert_eq!(seen.disks[0].folder(), None);
    }
}

#[test]
fn names_of_devices_and_remote_disks() {
    assert_eq!(base_name("/dev/vg/root").as_deref(), Some("root"));
    assert_eq!(base_name("rbd:pool/img").as_deref(), Some("img"));
    let of = |text: &str| described_file(&format!("json:{text}"));
    let rbd =
        r#"{"driver": "raw", "file": {"pool": "p", "image": "i", "conf": "/c", "driver": "rbd"}}"#;
    assert_eq!(of(rbd).as_deref(), Some("rbd:p/i"));
    let direct = r#"{"driver": "rbd", "pool": "p", "namespace": "n", "image": "i"}"#;
    assert_eq!(of(direct).as_deref(), Some("rbd:p/n/i"));
    let file = r#"{"driver": "raw", "file": {"driver": "file", "filename": "/vm/a", "x": 1}}"#;
    assert_eq!(of(file).as_deref(), Some("/vm/a"));
    let elsewhere = r#"{"driver": "ssh", "host": "h", "path": "/srv/a"}"#;
    assert!(of(elsewhere).is_none());
    assert!(of(r#"{"driver": "rbd", "pool": "p"}"#).is_none() && of("{").is_none());
    assert_eq!(base_name("nbd://h:10809/x").as_deref(), Some("x"));
    assert_eq!(base_name(""), None);
}
