//! A node made of network namespaces with the real programs in the real kernel: pods on a bridge, an agent's kernel
//! half driven by the test, and relays in place of the agent's proxies.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aya::{
    maps::{Array, HashMap, Map, MapData},
    programs::links::{FdLink, PinnedLink},
};
use mesh_ebpf_common::{
    CAPTURE_MARK, CAPTURE_TABLE, LAYOUT,
    map::{Config, FlowKey, FlowRecord, MAX_FLOWS},
    reason::Reason,
    wire::Target,
};
use mesh_node::kernel::{
    CleanWhat, Flow, Kernel, KernelConfig, KernelState, PairVerdict, PodIdentity, PodListeners, PodSlot,
    ProbeReport, clean,
};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};

/// A connect or read that takes longer has failed.
pub const DEADLINE: Duration = Duration::from_secs(5);
static BEDS: AtomicU32 = AtomicU32::new(0);
const BPFFS: &str = "/sys/fs/bpf";

pub fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip must run");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `work` in a namespace, in a thread of its own.
pub fn within<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(netns).unwrap_or_else(|error| panic!("{}: {error}", netns.display()));
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("setns");
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Waits for a state.
pub fn until(what: &str, mut look: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !look() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// One connection that reached the agent.
#[derive(Clone, Debug)]
pub struct Seen {
    pub door: Door,
    pub peer: SocketAddr,
    pub to: SocketAddr,
    pub flow: Option<Flow>,
}

/// Which listener of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Outbound,
    Plaintext,
    Hbone,
}

/// A pod: a namespace with addresses of both families.
pub struct Pod {
    pub name: String,
    pub netns: PathBuf,
    pub v4: IpAddr,
    pub v6: IpAddr,
    pub uid: String,
}

impl Pod {
    pub fn ip(&self, six: bool) -> IpAddr {
        if six { self.v6 } else { self.v4 }
    }

    /// Connects from inside.
    pub fn dial(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        within(&self.netns, || {
            let stream = TcpStream::connect_timeout(&to, DEADLINE)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            Ok(stream)
        })
    }

    /// Connects and reads what a [`Bed::serve`] server greets with: the client's address as it sees it.
    pub fn greeted(&self, to: SocketAddr) -> std::io::Result<(TcpStream, SocketAddr)> {
        let stream = self.dial(to)?;
        greeting(stream)
    }
}

/// Reads the greeting of a server.
pub fn greeting(mut stream: TcpStream) -> std::io::Result<(TcpStream, SocketAddr)> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&line).into_owned();
    let seen = text.parse().map_err(|_| std::io::Error::other(format!("no greeting but {text:?}")))?;
    Ok((stream, seen))
}

/// An agent: the kernel's side, listeners and relays.
pub struct Agent {
    pub kernel: Kernel,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    listeners: Vec<TcpListener>,
}

impl Agent {
    /// What reached the agent at that door.
    pub fn seen(&self, door: Door) -> Vec<Seen> {
        lock(&self.seen).iter().filter(|seen| seen.door == door).cloned().collect()
    }

    /// The door whose listener in that namespace has this cookie.
    pub fn door_of(&self, netns: u64, cookie: u64) -> Option<Door> {
        let option = |listener: &TcpListener, name| {
            let (mut value, mut length) = (0_u64, 8);
            // SAFETY: the kernel writes at most eight bytes into `value`.
            let result = unsafe {
                nix::libc::getsockopt(
                    std::os::fd::AsRawFd::as_raw_fd(listener),
                    nix::libc::SOL_SOCKET,
                    name,
                    (&raw mut value).cast(),
                    &raw mut length,
                )
            };
            assert_eq!(result, 0);
            value
        };
        const SO_COOKIE: i32 = 57;
        const SO_NETNS_COOKIE: i32 = 71;
        let mut listeners =
            self.listeners.iter().filter(|listener| option(listener, SO_NETNS_COOKIE) == netns);
        let port =
            listeners.find(|listener| option(listener, SO_COOKIE) == cookie)?.local_addr().unwrap().port();
        match port {
            15001 => Some(Door::Outbound),
            15006 => Some(Door::Plaintext),
            15008 => Some(Door::Hbone),
            _ => None,
        }
    }

    pub fn count(&self, reason: Reason) -> u64 {
        self.kernel.counters().unwrap().get(reason)
    }

    /// Verdicts for any port between enrolled pods.
    pub fn verdicts(&self, verdicts: &[(PodSlot, PodSlot, PairVerdict)]) {
        let verdicts = verdicts.iter().map(|(src, dst, verdict)| ((src.id, dst.id, 0), *verdict));
        self.kernel.sync(&KernelState { verdicts: verdicts.collect(), ..KernelState::default() }).unwrap();
    }
}

impl Agent {
    /// Ends as a process would: every socket and every handle closed, nothing released.
    pub fn die(self) {
        drop(self);
    }
}

fn flows(agent: &Agent) -> HashMap<MapData, FlowKey, FlowRecord> {
    let path = agent.kernel.pinned_maps().as_ref().join("FLOWS");
    HashMap::try_from(Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap()).unwrap()
}

/// Connects from exactly this address.
pub fn dial_from(from: SocketAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // No TIME_WAIT: the next attempt has the same address.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), DEADLINE)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket.into())
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for listener in &self.listeners {
            // Ends the blocked accept of the relay.
            let _ = socket2::SockRef::from(listener).shutdown(Shutdown::Both);
        }
    }
}

/// Namespaces of one test.
pub struct Bed {
    pub node: String,
    id: String,
    pods: Mutex<u32>,
    names: Mutex<Vec<String>>,
}

impl Bed {
    pub fn new() -> Self {
        sweep();
        let id = format!("umk{}x{}", std::process::id(), BEDS.fetch_add(1, Ordering::Relaxed));
        let bed = Self { node: id.clone(), id: id.clone(), pods: Mutex::new(0), names: Mutex::default() };
        let host = bed.namespace("h");
        ip(&format!("-n {host} link add br0 type bridge"));
        ip(&format!("-n {host} link set br0 up"));
        ip(&format!("-n {host} addr add 10.44.0.1/24 dev br0"));
        ip(&format!("-n {host} addr add fd44::1/64 dev br0 nodad"));
        bed
    }

    fn namespace(&self, suffix: &str) -> String {
        let name = format!("{}{suffix}", self.id);
        lock(&self.names).push(name.clone());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        name
    }

    /// The namespace on the bridge's side: not enrolled, stands for the node and everything outside.
    pub fn outside(&self) -> Pod {
        Pod {
            name: "outside".into(),
            netns: PathBuf::from(format!("/run/netns/{}h", self.id)),
            v4: [10, 44, 0, 1].into(),
            v6: "fd44::1".parse().unwrap(),
            uid: String::new(),
        }
    }

    /// A pod that is not enrolled yet.
    pub fn pod(&self, label: &str) -> Pod {
        let number = {
            let mut pods = lock(&self.pods);
            *pods += 1;
            *pods + 1
        };
        let name = self.namespace(label);
        let host = format!("{}h", self.id);
        ip(&format!("link add v{label} netns {host} type veth peer name eth0 netns {name}"));
        ip(&format!("-n {host} link set v{label} master br0 up"));
        let (v4, v6) = (format!("10.44.0.{number}"), format!("fd44::{number}"));
        ip(&format!("-n {name} addr add {v4}/24 dev eth0"));
        ip(&format!("-n {name} addr add {v6}/64 dev eth0 nodad"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} route add default via 10.44.0.1"));
        ip(&format!("-n {name} -6 route add default via fd44::1"));
        // What the agent's enrolment sets up besides the kernel's maps.
        let (mark, table) = (CAPTURE_MARK, CAPTURE_TABLE);
        for family in ["-4", "-6"] {
            ip(&format!("-n {name} {family} rule add fwmark {mark} lookup {table}"));
        }
        ip(&format!("-n {name} route add local default dev lo src {v4} table {table}"));
        ip(&format!("-n {name} -6 route add local default dev lo src {v6} table {table}"));
        let netns = PathBuf::from(format!("/run/netns/{name}"));
        within(&netns, || fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").expect("sysctl"));
        Pod { uid: format!("uid-{name}"), name, netns, v4: v4.parse().unwrap(), v6: v6.parse().unwrap() }
    }

    pub fn config(&self) -> KernelConfig {
        KernelConfig {
            node: self.node.clone(),
            bpffs: BPFFS.into(),
            mount_bpffs: true,
            cgroup: None,
            pod_flows: 0,
            log: false,
        }
    }

    /// Starts an agent of this bed's node.
    pub fn agent(&self) -> Agent {
        let (kernel, _) = Kernel::open(&self.config()).unwrap_or_else(|error| panic!("{error}"));
        self.agent_of(kernel)
    }

    /// Starts an agent that lets a pod have only so many connections.
    pub fn agent_with_quota(&self, pod_flows: u32) -> Agent {
        let config = KernelConfig { pod_flows, ..self.config() };
        let (kernel, _) = Kernel::open(&config).unwrap_or_else(|error| panic!("{error}"));
        self.agent_of(kernel)
    }

    /// An agent around what [`Bed::reopen`] gave.
    pub fn agent_of(&self, kernel: Kernel) -> Agent {
        Agent { kernel, seen: Arc::default(), stop: Arc::default(), listeners: Vec::new() }
    }

    /// Starts the agent again after [`Agent::die`], when the last of its threads has let go.
    pub fn reopen(&self) -> (Kernel, ProbeReport) {
        let mut opened = None;
        until("the former agent to be gone", || {
            opened = Kernel::open(&self.config()).ok();
            opened.is_some()
        });
        opened.unwrap()
    }

    /// Gives the addresses of one pod to another one.
    pub fn take_addresses(&self, from: &Pod, to: &Pod) {
        ip(&format!("-n {} link set eth0 down", from.name));
        let name = &to.name;
        ip(&format!("-n {name} addr flush dev eth0 scope global"));
        ip(&format!("-n {name} addr add {}/24 dev eth0", from.v4));
        ip(&format!("-n {name} addr add {}/64 dev eth0 nodad", from.v6));
        ip(&format!("-n {name} route replace default via 10.44.0.1"));
        ip(&format!("-n {name} -6 route replace default via fd44::1"));
        let table = CAPTURE_TABLE;
        ip(&format!("-n {} route replace local default dev lo src {} table {table}", to.name, from.v4));
        ip(&format!("-n {} -6 route replace local default dev lo src {} table {table}", to.name, from.v6));
        ip(&format!("-n {}h neigh flush all", self.id));
        for name in lock(&self.names).iter() {
            let _ = Command::new("ip").args(["-n", name, "neigh", "flush", "all"]).output();
        }
    }

    /// Puts a record into the kernel as no program would have written it.
    pub fn plant(
        &self,
        agent: &Agent,
        netns: u64,
        src: SocketAddr,
        dst: SocketAddr,
        record: FlowRecord,
    ) -> FlowKey {
        let (src, dst) = (Target::from(src), Target::from(dst));
        let key = FlowKey { netns, src: src.ip, dst: dst.ip, sport: src.port, dport: dst.port, pad: 0 };
        flows(agent).insert(key, FlowRecord { key, ..record }, 0).unwrap();
        key
    }

    /// Takes it out again.
    pub fn unplant(&self, agent: &Agent, key: &FlowKey) {
        let _ = flows(agent).remove(key);
    }

    /// Name of each pinned link, and the number of the program behind it.
    pub fn linked_programs(&self) -> BTreeMap<String, u32> {
        let links = Path::new(BPFFS).join("undermesh").join(LAYOUT).join(&self.node).join("links");
        let program = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.unwrap();
            let link = FdLink::from(PinnedLink::from_pin(entry.path()).unwrap());
            (entry.file_name().to_string_lossy().into_owned(), link.info().unwrap().program_id())
        };
        fs::read_dir(links).unwrap().map(program).collect()
    }

    /// Lets what `from` sends to `to` get lost on the way, or no more.
    pub fn lose(&self, from: &Pod, to: &Pod, lost: bool) {
        let verb = if lost { "replace" } else { "del" };
        let wrong = if lost { " lladdr 02:00:00:00:00:01 nud permanent" } else { "" };
        ip(&format!("-n {} neigh {verb} {}{wrong} dev eth0", from.name, to.v4));
    }

    /// Makes the next start take the attached programs for those of another object.
    pub fn forget_object(&self) {
        let path = Path::new(BPFFS).join("undermesh").join(LAYOUT).join(&self.node).join("maps/CONFIG");
        let map = Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap();
        let mut map = Array::<_, Config>::try_from(map).unwrap();
        let config = map.get(&0, 0).unwrap();
        map.set(0, Config { object: [0; 32], ..config }, 0).unwrap();
    }

    /// Leaves no room for another record.
    pub fn fill_flows(&self, agent: &Agent) {
        let mut map = flows(agent);
        let record = FlowRecord { kind: 4, ..FlowRecord::default() };
        for number in 0..u64::from(MAX_FLOWS) {
            let key = FlowKey { netns: u64::MAX - number, ..FlowKey::default() };
            map.insert(key, record, 0).unwrap();
        }
    }

    /// Starts another node's agent on the same kernel.
    pub fn other_agent(&self) -> Agent {
        let config = KernelConfig { node: format!("{}-2", self.node), ..self.config() };
        let (kernel, _) = Kernel::open(&config).unwrap_or_else(|error| panic!("{error}"));
        self.agent_of(kernel)
    }

    /// Two pods, and an agent that has enrolled them.
    pub fn pair(&self) -> (Pod, Pod, Agent, (PodSlot, PodSlot)) {
        let (a, b, mut agent) = (self.pod("a"), self.pod("b"), self.agent());
        let slots = (self.enrol(&mut agent, &a), self.enrol(&mut agent, &b));
        (a, b, agent, slots)
    }

    /// Opens the listeners of a pod, enrols it and relays what arrives there.
    pub fn enrol(&self, agent: &mut Agent, pod: &Pod) -> PodSlot {
        self.enrol_on(agent, pod, false)
    }

    /// The same; the listeners let others listen beside them, which no agent of ours does.
    pub fn enrol_shared(&self, agent: &mut Agent, pod: &Pod) -> PodSlot {
        self.enrol_on(agent, pod, true)
    }

    fn enrol_on(&self, agent: &mut Agent, pod: &Pod, shared: bool) -> PodSlot {
        let open = |port, six| within(&pod.netns, move || listener(port, six, shared));
        let doors: Vec<TcpListener> = [15001, 15006, 15008]
            .into_iter()
            .flat_map(|port| [open(port, false), open(port, true)])
            .collect();
        let [o4, o6, p4, p6, h4, h6] = &doors[..] else { unreachable!("six listeners") };
        let listeners = PodListeners {
            outbound_v4: o4,
            outbound_v6: Some(o6),
            plaintext_v4: p4,
            plaintext_v6: Some(p6),
            hbone_v4: h4,
            hbone_v6: Some(h6),
        };
        let identity = PodIdentity {
            uid: pod.uid.clone(),
            netns: File::open(&pod.netns).unwrap(),
            ips: vec![pod.v4, pod.v6],
        };
        let slot = agent.kernel.enrol(&identity, &listeners).unwrap_or_else(|error| panic!("enrol: {error}"));
        for (listener, door) in doors.into_iter().zip([
            Door::Outbound,
            Door::Outbound,
            Door::Plaintext,
            Door::Plaintext,
            Door::Hbone,
            Door::Hbone,
        ]) {
            agent.listeners.push(listener.try_clone().unwrap());
            let relay = Relay {
                kernel: agent.kernel.clone(),
                seen: agent.seen.clone(),
                stop: agent.stop.clone(),
                netns: pod.netns.clone(),
                slot,
                door,
            };
            thread::spawn(move || relay.run(&listener));
        }
        slot
    }

    /// Starts a dual-stack server in a pod that greets with the client's address and then echoes.
    pub fn serve(&self, pod: &Pod, port: u16) -> Server {
        let listener = within(&pod.netns, || {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).unwrap();
            socket.set_only_v6(false).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SocketAddr::new("::".parse().unwrap(), port).into()).unwrap();
            socket.listen(1024).unwrap();
            TcpListener::from(socket)
        });
        serve(listener)
    }
}

/// A server of [`Bed::serve`].
pub struct Server {
    listener: TcpListener,
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Server {
    /// Clients that the application has seen.
    pub fn accepted(&self) -> Vec<SocketAddr> {
        lock(&self.accepted).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both);
    }
}

fn serve(listener: TcpListener) -> Server {
    let server =
        Server { listener: listener.try_clone().unwrap(), stop: Arc::default(), accepted: Arc::default() };
    let (stop, accepted) = (server.stop.clone(), server.accepted.clone());
    thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            if stop.load(Ordering::Acquire) {
                return;
            }
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            lock(&accepted).push(peer);
            thread::spawn(move || {
                let _ = stream.write_all(format!("{peer}\n").as_bytes());
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    server
}

/// A listener of the agent.
pub fn listener(port: u16, six: bool, shared: bool) -> TcpListener {
    let socket =
        Socket::new(if six { Domain::IPV6 } else { Domain::IPV4 }, Type::STREAM, Some(Protocol::TCP))
            .unwrap();
    if six {
        socket.set_only_v6(true).unwrap();
    }
    socket.set_reuse_address(true).unwrap();
    if shared {
        socket.set_reuse_port(true).unwrap();
    }
    set_transparent(&socket);
    let any: IpAddr = if six { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
    socket.bind(&SocketAddr::new(any, port).into()).unwrap();
    socket.listen(1024).unwrap();
    socket.into()
}

/// Lets a socket use addresses that are not its namespace's. The option of IPv4 serves sockets of both families.
pub fn set_transparent(socket: &Socket) {
    socket.set_ip_transparent_v4(true).unwrap();
}

struct Relay {
    kernel: Kernel,
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    netns: PathBuf,
    slot: PodSlot,
    door: Door,
}

impl Relay {
    fn run(&self, listener: &TcpListener) {
        while let Ok((client, peer)) = listener.accept() {
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let to = client.local_addr().unwrap();
            let flow = (self.door == Door::Outbound).then(|| self.kernel.flow(self.slot, peer, to)).flatten();
            lock(&self.seen).push(Seen { door: self.door, peer, to, flow });
            let target = match (self.door, flow) {
                (Door::Outbound, Some(flow)) => flow.chosen.unwrap_or(flow.dialled),
                (Door::Plaintext, _) => to,
                // A tunnel is not what this test is about; an outbound connection without a record is refused.
                _ => continue,
            };
            let Some(server) = self.dial(target, (self.door == Door::Plaintext).then_some(peer.ip())) else {
                continue;
            };
            let (c, s) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || pump(client, server));
            thread::spawn(move || pump(s, c));
        }
    }

    fn dial(&self, to: SocketAddr, source: Option<IpAddr>) -> Option<TcpStream> {
        within(&self.netns, || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).unwrap();
            self.kernel.exempt(socket.as_fd()).unwrap();
            if let Some(source) = source {
                set_transparent(&socket);
                socket.set_mark(CAPTURE_MARK).unwrap();
                socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
            }
            socket.connect_timeout(&to.into(), DEADLINE).ok()?;
            Some(socket.into())
        })
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

impl Drop for Bed {
    fn drop(&mut self) {
        for node in [self.node.clone(), format!("{}-2", self.node)] {
            // A relay that dials in vain holds the agent for up to its deadline.
            for _ in 0..500 {
                if clean(Path::new(BPFFS), CleanWhat::Node(&node)).is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        for name in lock(&self.names).iter() {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// Removes what beds of dead processes left.
fn sweep() {
    let dead = |name: &str| {
        let pid = name.strip_prefix("umk")?.split('x').next()?;
        (!Path::new("/proc").join(pid).exists()).then_some(())
    };
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if dead(&name).is_some() {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
    for entry in fs::read_dir(format!("{BPFFS}/undermesh/{LAYOUT}")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if dead(&name).is_some() {
            let _ = clean(Path::new(BPFFS), CleanWhat::Node(&name));
        }
    }
}
