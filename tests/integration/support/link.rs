//! A link between two machines, as far as networks go: two namespaces and a pair of devices.

use super::{has, must, program, Need};

/// Two network namespaces, near and far, and a link between them; gone when dropped.
pub struct Link {
    names: [String; 2],
}

impl Link {
    /// The address at the near end.
    pub const NEAR: &'static str = "10.77.0.1";
    /// The address at the far end.
    pub const FAR: &'static str = "10.77.0.2";

    /// `None` where the machine does not allow it; that has been told then.
    pub fn new(test: &str) -> Option<Self> {
        const LINKS: &str = "exec unshare -n ip link add veth0 type veth peer name veth1";
        if !has(&[Need::Root, Need::Program("ip"), Need::Program("unshare"), Need::Kernel(LINKS)]) {
            return None;
        }
        let names = ["a", "b"].map(|end| format!("flexnbd-{}-{test}-{end}", std::process::id()));
        let link = Self { names };
        ip(&format!("netns add {}", link.names[0]));
        ip(&format!("-n {} link set lo up", link.names[0]));
        link.join_far();
        Some(link)
    }

    /// Makes the far end, and the link to it.
    fn join_far(&self) {
        let [a, b] = &self.names;
        ip(&format!("netns add {b}"));
        ip(&format!("-n {b} link set lo up"));
        ip(&format!("-n {a} link add veth0 type veth peer name veth0 netns {b}"));
        for (name, address) in [(a, Self::NEAR), (b, Self::FAR)] {
            ip(&format!("-n {name} address add {address}/24 dev veth0"));
            ip(&format!("-n {name} link set veth0 up"));
        }
    }

    /// Puts another machine in the place of the one at the far end, with the same address. What runs there has no link any
    /// more.
    pub fn replace_far(&mut self) {
        ip(&format!("-n {} link delete veth0", self.names[0]));
        let _ = program("ip").args(["netns", "delete", &self.names[1]]).output();
        self.names[1].push('2');
        self.join_far();
    }

    /// Takes the address of the near end away: it has no way to the far end any more.
    pub fn remove_near(&self) {
        ip(&format!("-n {} address delete {}/24 dev veth0", self.names[0], Self::NEAR));
    }

    /// Gives the near end its address back.
    pub fn add_near(&self) {
        ip(&format!("-n {} address add {}/24 dev veth0", self.names[0], Self::NEAR));
    }

    /// Lets so many bytes per second through, either way. False as [`Link::new`] gives `None`.
    pub fn shape(&self, bytes_per_s: u64) -> bool {
        const SHAPES: &str = "exec unshare -n sh -ec 'ip link add veth0 type veth peer name veth1; \
                              tc qdisc add dev veth0 root tbf rate 1mbit burst 32kb latency 50ms'";
        let can = has(&[Need::Program("tc"), Need::Kernel(SHAPES)]);
        for name in self.names.iter().filter(|_| can) {
            let bits = bytes_per_s * 8;
            let shape = format!("-n {name} qdisc add dev veth0 root tbf rate {bits}bit burst 256kb latency 50ms");
            must("tc", &shape.split_whitespace().collect::<Vec<_>>());
        }
        can
    }

    /// Gives the far end this address, besides what it has.
    pub fn add_far(&self, address: &str) {
        ip(&format!("-n {} address add {address}/24 dev veth0", self.names[1]));
    }

    /// Takes an address of the far end away: nobody answers there any more.
    pub fn remove_far(&self, address: &str) {
        ip(&format!("-n {} address delete {address}/24 dev veth0", self.names[1]));
    }

    /// What runs a program at one of the ends, 0 for near.
    pub fn inside(&self, end: usize) -> [&str; 4] {
        ["ip", "netns", "exec", &self.names[end]]
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = program("ip").args(["netns", "delete", name]).output();
        }
    }
}

#[track_caller]
fn ip(line: &str) {
    must("ip", &line.split_whitespace().collect::<Vec<_>>());
}
