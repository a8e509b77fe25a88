//! Ranks that are processes with a connection between each two of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Result, bail};

use super::{Collective, part};

/// Ranks that are processes, on one machine or on several, or threads, without a library for it: each two of them have a
/// connection.
///
/// ```no_run
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use candle_srkl::{ParamsSrkl, Srkl, Tcp};
///
/// // The same program is started twice: `train 0 2` and `train 1 2`.
/// let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
/// let (rank, world_size) = (numbers[0], numbers[1]);
/// let w = Var::new(1f32, &Device::Cpu)?;
/// let mut opt = Srkl::builder()
///     .default_group(ParamsSrkl::sgd(0.1))
///     .collective(Tcp::new("127.0.0.1:29400", rank, world_size)?)
///     .build([("w".to_string(), w.clone())])?;
/// opt.backward_step(&w.sqr()?)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Nothing is encrypted, and whoever can connect can be a rank: for networks that are your own.
///
/// A rank that returns, panics or is killed makes the calls of the others fail.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    /// The connections to all ranks, but for the one to itself.
    links: Vec<Option<TcpStream>>,
    /// Why there are no more calls.
    failed: Option<String>,
}

/// How long `new` waits for others.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it looks for them.
const PAUSE: Duration = Duration::from_millis(5);

/// What a connection begins with.
const HELLO: &[u8; 8] = b"srkl-tcp";

/// Messages up to this length are written before any is read: the system has room for them.
const SMALL: usize = 8 << 10;

/// What a message is: for a call, or the last one.
const CALL: u8 = 0;
const LAST: u8 = 1;

/// A rank that comes: its number, how many it expects, and where it listens.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    rank: usize,
    world_size: usize,
    port: u16,
}

impl Tcp {
    /// Waits until all ranks have come, up to a minute. Rank 0 listens at `address`, to which the others connect; these listen
    /// at ports that the system chooses.
    ///
    /// # Errors
    ///
    /// An address that can't be used, ranks that do not come or expect another number of them, or a number that two have.
    pub fn new(address: impl ToSocketAddrs, rank: usize, world_size: usize) -> Result<Self> {
        if rank >= world_size {
            bail!("`Tcp::new`: expected a rank below its `world_size` {world_size}, got {rank}")
        }
        let links = (0..world_size).map(|_| None).collect();
        let mut tcp = Self { rank, links, failed: None };
        if world_size > 1 {
            let deadline = Instant::now() + PATIENCE;
            tcp.connect(address, deadline)
                .map_err(|e| e.context(format!("`Tcp::new` of rank {rank}")))?;
        }
        Ok(tcp)
    }

    fn connect(&mut self, address: impl ToSocketAddrs, deadline: Instant) -> Result<()> {
        let (rank, world_size) = (self.rank, self.links.len());
        if rank == 0 {
            let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
            let listener = TcpListener::bind(&addresses[..])?;
            let arrived = self.accept(&listener, 1..world_size, deadline)?;
            // Where each is, for those that come after it.
            let mut list = String::new();
            for (rank, port) in arrived {
                let ip = self.link(rank)?.peer_addr()?.ip();
                list += &format!("{}\n", SocketAddr::new(ip, port));
            }
            return (1..world_size)
                .try_for_each(|rank| self.send(rank, CALL, "ranks", list.as_bytes()));
        }
        let first = connect(address, deadline)?;
        let local: IpAddr = first.local_addr()?.ip();
        let listener = TcpListener::bind((local, 0))?;
        let own = Arrival { rank, world_size, port: listener.local_addr()?.port() };
        say_hello(&first, own)?;
        self.links[0] = Some(first);
        let list = self.receive(0, "ranks")?;
        let list = String::from_utf8_lossy(&list).into_owned();
        for (other, address) in (1..rank).zip(list.lines()) {
            let link = connect(address, deadline)?;
            say_hello(&link, own)?;
            self.links[other] = Some(link);
        }
        self.accept(&listener, rank + 1..world_size, deadline).map(|_| ())
    }

    /// Waits for the ranks of these numbers. Returns where they listen.
    fn accept(
        &mut self,
        listener: &TcpListener,
        expected: std::ops::Range<usize>,
        deadline: Instant,
    ) -> Result<Vec<(usize, u16)>> {
        listener.set_nonblocking(true)?;
        let mut arrived = vec![];
        while arrived.len() < expected.len() {
            match listener.accept() {
                Ok((link, _)) => {
                    link.set_nonblocking(false)?;
                    let Ok(arrival) = hear_hello(&link) else { continue }; // Somebody else.
                    let Arrival { rank, world_size, port } = arrival;
                    if world_size != self.links.len() {
                        bail!(
                            "expected {} ranks, rank {rank} expects {world_size}",
                            self.links.len()
                        )
                    }
                    if !expected.contains(&rank) || self.links[rank].is_some() {
                        bail!("two processes are rank {rank}")
                    }
                    self.links[rank] = Some(link);
                    arrived.push((rank, port));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    thread::sleep(PAUSE);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let missing = expected.filter(|rank| self.links[*rank].is_none());
                    let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
                    bail!("these ranks have not come within {PATIENCE:?}: {}", missing.join(", "))
                }
                Err(e) => Err(e)?,
            }
        }
        arrived.sort_unstable();
        Ok(arrived)
    }

    fn link(&self, rank: usize) -> Result<&TcpStream> {
        match self.links.get(rank) {
            Some(Some(link)) => Ok(link),
            _ => bail!("there is no connection to rank {rank}"),
        }
    }

    fn send(&self, rank: usize, kind: u8, call: &str, bytes: &[u8]) -> Result<()> {
        let mut message = vec![kind];
        message.extend((call.len() as u64).to_le_bytes());
        message.extend((bytes.len() as u64).to_le_bytes());
        message.extend(call.as_bytes());
        let mut link = self.link(rank)?;
        if bytes.len() <= SMALL {
            message.extend(bytes);
        }
        let written = link.write_all(&message);
        let written = written.and_then(|()| match bytes.len() <= SMALL {
            true => Ok(()),
            false => link.write_all(bytes),
        });
        // Whoever has left may have said why.
        match written {
            Err(e) if kind == CALL => {
                self.receive(rank, call)?;
                bail!("rank {rank} has left: {e}")
            }
            _ => Ok(()),
        }
    }

    /// The next message of a rank, which must be for the same call.
    fn receive(&self, rank: usize, call: &str) -> Result<Vec<u8>> {
        let read = |len: usize| -> Result<Vec<u8>> {
            let mut bytes = vec![0; len];
            match self.link(rank)?.read_exact(&mut bytes) {
                Ok(()) => Ok(bytes),
                Err(e) => bail!("rank {rank} has left: {e}"),
            }
        };
        let head = read(17)?;
        let len = |at: usize| {
            let bytes = head[at..].first_chunk().copied().unwrap_or_default();
            u64::from_le_bytes(bytes) as usize
        };
        let other = String::from_utf8_lossy(&read(len(1))?).into_owned();
        if head[0] == LAST {
            bail!("{other}")
        }
        if other != call {
            bail!("rank {} calls {call}, rank {rank} calls {other}", self.rank)
        }
        read(len(9))
    }

    /// Sends each rank its bytes, and returns what each has sent.
    fn meet<'b>(&mut self, call: &str, to: impl Fn(usize) -> &'b [u8]) -> Result<Vec<Vec<u8>>> {
        if let Some(why) = &self.failed {
            bail!("{why}")
        }
        let met = self.try_meet(call, to);
        if let Err(e) = &met {
            self.end(e.to_string());
        }
        met
    }

    fn try_meet<'b>(&self, call: &str, to: impl Fn(usize) -> &'b [u8]) -> Result<Vec<Vec<u8>>> {
        let world_size = self.links.len();
        let mut received = vec![vec![]; world_size];
        received[self.rank] = to(self.rank).to_vec();
        for round in 1..world_size {
            // In each round every rank sends to one and receives from one: nobody waits in a circle.
            let target = (self.rank + round) % world_size;
            let source = (self.rank + world_size - round) % world_size;
            let bytes = to(target);
            if bytes.len() <= SMALL {
                self.send(target, CALL, call, bytes)?;
                received[source] = self.receive(source, call)?;
                continue;
            }
            let (sent, got) = thread::scope(|scope| {
                let sending = scope.spawn(|| self.send(target, CALL, call, bytes));
                let got = self.receive(source, call);
                (sending.join(), got)
            });
            received[source] = got?;
            match sent {
                Ok(sent) => sent?,
                Err(_) => bail!("sending to rank {target} has panicked"),
            }
        }
        Ok(received)
    }

    /// Tells all ranks why there are no more calls, and closes the connections, so that nobody waits for this rank.
    fn end(&mut self, why: String) {
        for rank in (0..self.links.len()).filter(|rank| *rank != self.rank) {
            // Whoever does not read it has failed too.
            if let Ok(link) = self.link(rank)
                && link.set_write_timeout(Some(Duration::from_secs(1))).is_ok()
            {
                let _ = self.send(rank, LAST, &why, &[]);
            }
        }
        self.links.iter_mut().for_each(|link| *link = None);
        self.failed = Some(why);
    }
}

/// Connects to a rank that listens, or will soon.
fn connect(address: impl ToSocketAddrs, deadline: Instant) -> Result<TcpStream> {
    let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
    loop {
        match TcpStream::connect(&addresses[..]) {
            Ok(link) => return Ok(link),
            Err(_) if Instant::now() < deadline => thread::sleep(PAUSE),
            Err(e) => bail!("nobody listens at {addresses:?}: {e}"),
        }
    }
}

fn say_hello(mut link: &TcpStream, Arrival { rank, world_size, port }: Arrival) -> Result<()> {
    link.set_nodelay(true)?;
    let mut hello = HELLO.to_vec();
    for number in [rank as u64, world_size as u64, port as u64] {
        hello.extend(number.to_le_bytes());
    }
    Ok(link.write_all(&hello)?)
}

fn hear_hello(mut link: &TcpStream) -> Result<Arrival> {
    link.set_nodelay(true)?;
    link.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut hello = [0; 32];
    link.read_exact(&mut hello)?;
    link.set_read_timeout(None)?;
    let (said, numbers) = hello.split_at(HELLO.len());
    if said != HELLO {
        bail!("expected another rank")
    }
    let numbers = numbers.as_chunks().0;
    let number = |i: usize| u64::from_le_bytes(numbers[i]) as usize;
    Ok(Arrival { rank: number(0), world_size: number(1), port: number(2) as u16 })
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn all_to_all(&mut self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        let own = parts[self.rank];
        let sent =
            self.meet(&format!("all_to_all of {parts:?}"), |rank| &from[part(parts, rank)])?;
        if own > 0 {
            to.chunks_mut(own).zip(sent).for_each(|(to, from)| to.copy_from_slice(&from));
        }
        Ok(())
    }

    fn all_gather(&mut self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        let own = &whole[part(parts, self.rank)];
        let sent = self.meet(&format!("all_gather of {parts:?}"), |_| own)?;
        for (rank, from) in sent.iter().enumerate() {
            whole[part(parts, rank)].copy_from_slice(from);
        }
        Ok(())
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.meet("exchange", |_| own)
    }

    fn abort(&mut self, why: &str) {
        if self.failed.is_none() {
            self.end(format!("rank {}: {why}", self.rank));
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if self.failed.is_none() {
            let how = if thread::panicking() { "has panicked" } else { "has left" };
            self.end(format!("rank {} {how}", self.rank));
        }
    }
}
