//! Ranks that are processes with a connection between each two of them.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
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
/// A rank that returns, panics or is killed makes the calls of the others fail. A machine that loses its power or its network says
/// nothing, and the others wait for it.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    world_size: usize,
    /// The connections to all ranks, but for the one to itself.
    links: Vec<Option<TcpStream>>,
    /// Why there are no more calls.
    failed: Option<String>,
}

/// How long `new` waits for others.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long one attempt to connect takes at most: a name may have other addresses.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How often it looks for them.
const PAUSE: Duration = Duration::from_millis(5);

/// What a connection begins with: a name, and a version of what follows.
const HELLO: &[u8; 8] = b"srkltcp1";

/// Messages up to this length are written before any is read: the system has room for them.
const SMALL: usize = 8 << 10;

/// Bytes are sent in pieces: between two of them a rank may say that there are no more.
const PIECE: usize = 64 << 10;

/// The longest name of a call.
const LONGEST: usize = 1 << 20;

/// What comes next: a call, a piece of its bytes, or why there are no more calls.
const CALL: u8 = b'c';
const MORE: u8 = b'm';
const LAST: u8 = b'l';

/// How long a rank that has failed waits for others to say why.
const REASONS: Duration = Duration::from_secs(1);

/// A rank that comes: its number, how many it expects, and where it listens.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    rank: usize,
    world_size: usize,
    port: u16,
}

impl Tcp {
    /// Waits until all ranks have come, up to a minute after rank 0. Rank 0 listens at `address`, to which the others connect;
    /// these listen at ports that the system chooses, and must be able to reach each other.
    ///
    /// # Errors
    ///
    /// An address that can't be used, ranks that do not come or expect another number of them, or a number that two have.
    pub fn new(address: impl ToSocketAddrs, rank: usize, world_size: usize) -> Result<Self> {
        if rank >= world_size {
            bail!("`Tcp::new`: expected a rank below its `world_size` {world_size}, got {rank}")
        }
        let links = (0..world_size).map(|_| None).collect();
        let mut tcp = Self { rank, world_size, links, failed: None };
        if world_size > 1
            && let Err(e) = tcp.connect(address)
        {
            let why = format!("`Tcp::new` of rank {rank}: {e}");
            tcp.end(why.clone());
            bail!("{why}")
        }
        Ok(tcp)
    }

    fn connect(&mut self, address: impl ToSocketAddrs) -> Result<()> {
        let (rank, world_size) = (self.rank, self.world_size);
        let deadline = Instant::now() + PATIENCE;
        let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
        if rank == 0 {
            let listener = TcpListener::bind(&addresses[..])?;
            let arrived = self.accept(&listener, 1..world_size, deadline)?;
            // Where each is, for those that come after it.
            let mut list = String::new();
            for (rank, port) in arrived {
                let ip = self.link(rank)?.peer_addr()?.ip();
                list += &format!("{}\n", SocketAddr::new(ip, port));
            }
            return (1..world_size).try_for_each(|rank| self.send(rank, "ranks", list.as_bytes()));
        }
        let first = connect(&addresses, deadline)?;
        let listener = TcpListener::bind((first.local_addr()?.ip(), 0))?;
        let own = Arrival { rank, world_size, port: listener.local_addr()?.port() };
        say_hello(&first, own)?;
        // Rank 0 may wait for others as long as we have.
        first.set_read_timeout(Some(2 * PATIENCE))?;
        self.links[0] = Some(first);
        let list = self.receive(0, "ranks")?;
        self.link(0)?.set_read_timeout(None)?;
        let list = String::from_utf8_lossy(&list).into_owned();
        // All others are there.
        let deadline = Instant::now() + PATIENCE;
        for (other, address) in (1..rank).zip(list.lines()) {
            let link = connect(&address.to_socket_addrs()?.collect::<Vec<_>>(), deadline)?;
            say_hello(&link, own)?;
            self.links[other] = Some(link);
        }
        self.accept(&listener, rank + 1..world_size, deadline).map(|_| ())
    }

    /// Waits for the ranks of these numbers. Returns where they listen.
    fn accept(
        &mut self,
        listener: &TcpListener,
        expected: Range<usize>,
        deadline: Instant,
    ) -> Result<Vec<(usize, u16)>> {
        listener.set_nonblocking(true)?;
        let mut arrived = vec![];
        while arrived.len() < expected.len() {
            match listener.accept() {
                Ok((link, _)) => {
                    link.set_nonblocking(false)?;
                    let arrival = match hear_hello(&link) {
                        Ok(arrival) => arrival,
                        // Somebody else.
                        Err(_) if Instant::now() < deadline => continue,
                        Err(e) => return Err(e),
                    };
                    if let Err(e) = self.fits(arrival, &expected) {
                        let _ = write_last(&link, &e.to_string());
                        return Err(e);
                    }
                    self.links[arrival.rank] = Some(link);
                    arrived.push((arrival.rank, arrival.port));
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

    /// An error if a rank is not one of those that are missing.
    fn fits(&self, arrival: Arrival, expected: &Range<usize>) -> Result<()> {
        let Arrival { rank, world_size, .. } = arrival;
        if world_size != self.world_size {
            bail!("expected {} ranks, rank {rank} expects {world_size}", self.world_size)
        }
        if !expected.contains(&rank) {
            bail!("expected ranks {expected:?}, got rank {rank}")
        }
        if self.links[rank].is_some() {
            bail!("two processes are rank {rank}")
        }
        Ok(())
    }

    fn link(&self, rank: usize) -> Result<&TcpStream> {
        match self.links.get(rank) {
            Some(Some(link)) => Ok(link),
            _ => bail!("there is no connection to rank {rank}"),
        }
    }

    /// Sends a rank its bytes of a call.
    fn send(&self, rank: usize, call: &str, bytes: &[u8]) -> Result<()> {
        match self.link(rank).and_then(|link| Ok(write_call(link, call, bytes, &|| false)?)) {
            Ok(()) => Ok(()),
            Err(e) => bail!("{}", self.why_left(rank, &e.to_string())),
        }
    }

    /// The next bytes of a rank, which must be for the same call.
    fn receive(&self, rank: usize, call: &str) -> Result<Vec<u8>> {
        let mut link = self.link(rank)?;
        let mut read = |bytes: &mut [u8]| match link.read_exact(bytes) {
            Ok(()) => Ok(()),
            Err(e) => bail!("rank {rank} has left: {e}"),
        };
        // What comes next, with the text of the last message.
        let mut next = || -> Result<(u8, u64, String)> {
            let mut kind = [0];
            read(&mut kind)?;
            if kind[0] == MORE {
                return Ok((MORE, 0, String::new()));
            }
            let (mut text, mut len) = ([0; 8], [0; 8]);
            read(&mut text)?;
            read(&mut len)?;
            let text = u64::from_le_bytes(text) as usize;
            if !matches!(kind[0], CALL | LAST) || text > LONGEST {
                bail!("what rank {rank} should be is something else")
            }
            let mut bytes = vec![0; text];
            read(&mut bytes)?;
            let text = String::from_utf8_lossy(&bytes).into_owned();
            Ok((kind[0], u64::from_le_bytes(len), text))
        };
        let (kind, len, other) = next()?;
        if kind == LAST {
            bail!("{other}")
        }
        if other != call {
            bail!("rank {} calls {call}, rank {rank} calls {other}", self.rank)
        }
        let mut bytes = vec![];
        while (bytes.len() as u64) < len {
            let (kind, _, why) = next()?;
            if kind != MORE {
                bail!("{why}")
            }
            let start = bytes.len();
            bytes.resize(start + PIECE.min((len - start as u64) as usize), 0);
            match self.link(rank)?.read_exact(&mut bytes[start..]) {
                Ok(()) => {}
                Err(e) => bail!("rank {rank} has left: {e}"),
            }
        }
        Ok(bytes)
    }

    /// Why a rank takes no more, if it has said so: what it has sent is read to its end.
    fn why_left(&self, rank: usize, error: &str) -> String {
        let left = || -> Option<String> {
            let link = self.link(rank).ok()?;
            link.set_read_timeout(Some(REASONS)).ok()?;
            let mut rest = vec![];
            // As much as a connection holds.
            let _ = link.take(16 << 20).read_to_end(&mut rest);
            // The last message of all ends what there is.
            let text = |at: usize| {
                let len = u64::from_le_bytes(*rest.get(at + 1..)?.first_chunk()?);
                let text = rest.get(at + 17..)?;
                (rest[at] == LAST && text.len() as u64 == len).then_some(text)
            };
            let text = (0..rest.len()).rev().find_map(text)?;
            Some(String::from_utf8_lossy(text).into_owned())
        };
        left().unwrap_or_else(|| format!("rank {rank} has left: {error}"))
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
        let world_size = self.world_size;
        let mut received = vec![vec![]; world_size];
        received[self.rank] = to(self.rank).to_vec();
        for round in 1..world_size {
            // In each round every rank sends to one and receives from one: nobody waits in a circle.
            let target = (self.rank + round) % world_size;
            let source = (self.rank + world_size - round) % world_size;
            let bytes = to(target);
            received[source] = if bytes.len() <= SMALL {
                self.send(target, call, bytes)?;
                self.receive(source, call)?
            } else {
                self.send_and_receive(call, (target, bytes), source)?
            };
        }
        Ok(received)
    }

    /// Sends many bytes to one rank while it receives those of another.
    fn send_and_receive(
        &self,
        call: &str,
        (target, bytes): (usize, &[u8]),
        source: usize,
    ) -> Result<Vec<u8>> {
        let link = self.link(target)?;
        let stop = AtomicBool::new(false);
        let (sent, received) = thread::scope(|scope| {
            let stops = || stop.load(Ordering::Relaxed);
            let sending = scope.spawn(move || write_call(link, call, bytes, &stops));
            let received = self.receive(source, call);
            if received.is_err() {
                // It ends with a piece, so that its reader can be told why; but nobody may read any more.
                stop.store(true, Ordering::Relaxed);
                let until = Instant::now() + REASONS;
                while !sending.is_finished() && Instant::now() < until {
                    thread::sleep(PAUSE);
                }
                if !sending.is_finished() {
                    let _ = link.shutdown(Shutdown::Both);
                }
            }
            (sending.join(), received)
        });
        match (sent, received) {
            (Ok(Err(e)), Ok(_)) => bail!("{}", self.why_left(target, &e.to_string())),
            (Err(_), Ok(_)) => bail!("sending to rank {target} has panicked"),
            (_, received) => received,
        }
    }

    /// Tells all ranks why there are no more calls, and closes the connections, so that nobody waits for this rank.
    fn end(&mut self, why: String) {
        for link in self.links.iter_mut().filter_map(Option::take) {
            // Whoever does not read it has failed too.
            let _ = write_last(&link, &why);
        }
        self.failed = Some(why);
    }
}

/// Writes a call and its bytes, unless it `stops` in between.
fn write_call(
    mut link: &TcpStream,
    call: &str,
    bytes: &[u8],
    stops: &dyn Fn() -> bool,
) -> io::Result<()> {
    let mut message = vec![CALL];
    message.extend((call.len() as u64).to_le_bytes());
    message.extend((bytes.len() as u64).to_le_bytes());
    message.extend(call.as_bytes());
    for piece in bytes.chunks(PIECE) {
        if stops() {
            break;
        }
        message.push(MORE);
        message.extend(piece);
        link.write_all(&message)?;
        message.clear();
    }
    link.write_all(&message)
}

fn write_last(mut link: &TcpStream, why: &str) -> io::Result<()> {
    link.set_write_timeout(Some(REASONS))?;
    let mut message = vec![LAST];
    message.extend((why.len() as u64).to_le_bytes());
    message.extend(0u64.to_le_bytes());
    message.extend(why.as_bytes());
    link.write_all(&message)
}

/// Connects to a rank that listens, or will soon.
fn connect(addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream> {
    loop {
        let mut failed = None;
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            match TcpStream::connect_timeout(address, left.clamp(PAUSE, ATTEMPT)) {
                // Where nobody listens a connection may meet itself, if the system has chosen that port for it.
                Ok(link) if link.local_addr()? == link.peer_addr()? => {}
                Ok(link) => return Ok(link),
                Err(e) => failed = Some(e),
            }
        }
        if Instant::now() >= deadline {
            let why = failed.map_or(String::new(), |e| format!(": {e}"));
            bail!("nobody listens at {addresses:?}{why}")
        }
        thread::sleep(PAUSE);
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
    // It comes in one packet.
    link.set_read_timeout(Some(REASONS))?;
    let (mut said, mut numbers) = ([0; 8], [0; 24]);
    link.read_exact(&mut said)?;
    if said != *HELLO {
        bail!("expected another rank")
    }
    link.read_exact(&mut numbers)?;
    link.set_read_timeout(None)?;
    let numbers = numbers.as_chunks().0;
    let number = |i: usize| u64::from_le_bytes(numbers[i]) as usize;
    Ok(Arrival { rank: number(0), world_size: number(1), port: number(2) as u16 })
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
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
