//! A mount that nfs-ganesha exports: it reaches every file by its handle, whatever the kernel has
//! forgotten in between. (The kernel here need not have NFS: the client is libnfs.)

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::guard::tied;
use crate::support::images::{Chain, Oracle, first_difference};
use crate::support::mount::Mount;
use crate::support::tools::{have, is_root};

const TOOLS: &[&str] = &["qemu-img", "qemu-io", "/dev/fuse", "ganesha.nfsd", "nfs-cat", "nfs-ls"];
const SIZE: u64 = 8 << 20;

/// A server of its own on a port of its own; ended on drop.
struct Ganesha {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Ganesha {
    /// Exports `mount` as `/points`.
    fn start(mount: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        // As few entries and descriptors as it lets one have: what it knows it looks up again.
        let config = format!(
            r#"
            NFS_CORE_PARAM {{ NFS_Port = {port}; Bind_Addr = 127.0.0.1; NFS_Protocols = 4;
                              Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
            NFSv4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = "{dir}"; }}
            NFS_KRB5 {{ Active_krb5 = false; CCacheDir = "{dir}"; }}
            MDCACHE {{ Entries_HWMark = 1; LRU_Run_Interval = 1; FD_HWMark_Percent = 1;
                       FD_LWMark_Percent = 0; }}
            EXPORT {{ Export_Id = 1; Path = "{mount}"; Pseudo = /points; Access_Type = RO;
                      Squash = None; SecType = sys; Protocols = 4; Transports = TCP;
                      FSAL {{ Name = VFS; }} }}
            "#,
            dir = dir.path().display(),
            mount = mount.display()
        );
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("conf"), config).unwrap();
        let mut server = Command::new("ganesha.nfsd");
        server.arg("-F").arg("-f").arg(path("conf")).arg("-L").arg(path("log"));
        server.arg("-p").arg(path("pid")).stdin(Stdio::null());
        server.stdout(Stdio::null()).stderr(Stdio::null());
        let child = tied(&mut server).spawn().expect("ganesha starts");
        let mut server = Ganesha { child, port, dir };
        let end = Instant::now() + Duration::from_secs(60);
        while !server.said().contains("NFS SERVER INITIALIZED") {
            let lives = server.child.try_wait().unwrap().is_none();
            assert!(lives && Instant::now() < end, "it does not come up: {}", server.said());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn client(&self, program: &str, path: &str) -> Command {
        let mut client = Command::new(program);
        client.arg(format!("nfs://127.0.0.1/points/{path}?version=4&nfsport={}", self.port));
        client.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        client
    }

    fn cat(&self, path: &str) -> Vec<u8> {
        let out = self.client("nfs-cat", path).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{path}: {said}\n{}", self.said());
        out.stdout
    }
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// The kernel forgets all names and inodes that nobody has open.
fn forget() {
    std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

#[test]
fn an_export_by_nfs_goes_on_after_the_kernel_forgot_the_inodes() {
    let test = "an_export_by_nfs_goes_on_after_the_kernel_forgot_the_inodes";
    if !have(test, TOOLS) || !is_root(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut points = Vec::new();
    for (n, name) in ["sda", "sdb", "sdc"].into_iter().enumerate() {
        let mut chain = Chain::new(dir.path(), name);
        for p in 0..3 {
            let byte = 1 + n * 16 + p;
            chain.point("", SIZE, &[format!("write -P {byte} {p}M 4M")]);
        }
        let chain = chain.finish();
        let oracle = Oracle::new(&chain.files);
        for (i, file) in chain.files.iter().enumerate() {
            let file = file.file_name().unwrap().to_str().unwrap();
            points.push((format!("{name}/{file}.raw"), oracle.bytes(i)));
        }
    }
    let mount = Mount::new(dir.path());
    let server = Ganesha::start(mount.path());
    // One that reads on where it was. It stops at the pipe, which is smaller than what is left.
    let mut slow = server.client("nfs-cat", &points[8].0).spawn().unwrap();
    let mut begun = vec![0; 64 << 10];
    let mut pipe = slow.stdout.take().unwrap();
    pipe.read_exact(&mut begun).unwrap();
    for round in 0..3 {
        for (path, wanted) in &points {
            forget();
            if let Some(d) = first_difference(&server.cat(path), wanted) {
                panic!("round {round}, {path}: {d}");
            }
        }
        forget();
        let out = server.client("nfs-ls", "sda").output().unwrap();
        let list = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && list.matches("-sda.qcow2.raw").count() == 3, "{list}");
    }
    forget();
    pipe.read_to_end(&mut begun).unwrap();
    assert!(slow.wait().unwrap().success());
    assert_eq!(first_difference(&begun, &points[8].1), None);
    assert!(!server.said().contains("ESTALE"), "{}", server.said());
}
