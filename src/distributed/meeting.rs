//! Meeting of ranks over TCP: rank 0 tells the others the name of their group, and nothing else.
//!
//! Each rank connects to rank 0, says who it is in [`HELLO`] bytes, and gets [`ANSWER`] bytes once all have come. The
//! connections then stay open and silent: one that closes tells that a process has ended.

use std::{
    env,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

use crate::{Error, Result, collect::CollectVec, error::ensure};

const OP: &str = "ranks";
const MAGIC: [u8; 8] = *b"xt-nccl1";
/// The magic bytes, and rank, number of ranks and version of NCCL as u32.
const HELLO: usize = 20;
/// The magic bytes, a version of NCCL as u32, and the name.
const ANSWER: usize = 12 + NAME;
const NAME: usize = 128;
/// Version field of a refusal; the version of rank 0 follows as text, padded with zeros.
const OTHER_VERSION: u32 = 0;
/// Time that a connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Place where ranks meet.
#[derive(Debug)]
pub(super) struct Place {
    host: String,
    port: u16,
}

impl Place {
    /// Reads `MASTER_ADDR` and `MASTER_PORT`; the port is the next one, as torchrun uses that one itself, or that of
    /// `XT_NCCL_PORT`.
    pub fn from_env() -> Result<Self> {
        Self::of(&|name| env::var(name).ok())
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str, text: &str| {
            let port = text.parse::<u16>().ok().filter(|&port| port > 0);
            port.ok_or_else(|| {
                Error::argument(OP, format_args!("expected a port, 1 to 65535, in {name}, got `{text}`"))
            })
        };
        let missing = |name: &str| {
            Error::argument(
                OP,
                format_args!(
                    "{name} is not set; NCCL's ranks meet at MASTER_ADDR, the address of the machine of rank 0, on the port \
                     after MASTER_PORT. torchrun sets both; mpirun passes them on by `-x MASTER_ADDR=HOST -x MASTER_PORT=29500`"
                ),
            )
        };
        let host = variable("MASTER_ADDR").filter(|host| !host.is_empty()).ok_or_else(|| missing("MASTER_ADDR"))?;
        let port = match variable("XT_NCCL_PORT") {
            Some(text) => number("XT_NCCL_PORT", &text)?,
            None => {
                let text = variable("MASTER_PORT").ok_or_else(|| missing("MASTER_PORT"))?;
                let port = number("MASTER_PORT", &text)?.checked_add(1);
                port.ok_or_else(|| Error::argument(OP, "there is no port after MASTER_PORT = 65535; set XT_NCCL_PORT"))?
            }
        };
        Ok(Self { host, port })
    }

    fn name(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Listens: on this machine alone if the address is one that only it can reach.
    fn listen(&self) -> Result<TcpListener> {
        let local = self.host == "localhost" || self.host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        let tries: &[&str] = if local { &[&self.host] } else { &["::", "0.0.0.0"] };
        let mut result = Err(ErrorKind::AddrNotAvailable.into());
        for host in tries {
            result = TcpListener::bind((*host, self.port));
            if result.as_ref().err().is_none_or(|why| why.kind() == ErrorKind::AddrInUse) {
                break;
            }
        }
        let listener = result.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
        listener.map_err(|why| {
            let advice = "; end the program that listens there, or set XT_NCCL_PORT to a free port on all ranks";
            let advice = if why.kind() == ErrorKind::AddrInUse { advice } else { "" };
            Error::argument(OP, format_args!("rank 0 cannot listen on port {}: {why}{advice}", self.port))
        })
    }
}

/// Connections to the other ranks: of rank 0 to all, of the others to rank 0.
#[derive(Debug)]
pub(super) struct Meeting {
    others: Vec<(usize, TcpStream)>,
}

/// This rank, the number of ranks, and its version of NCCL.
#[derive(Clone, Copy)]
pub(super) struct Member {
    pub rank: usize,
    pub size: usize,
    pub version: u32,
    /// Writes a version.
    pub text: fn(i32) -> String,
}

impl Meeting {
    /// Meets the other ranks. Rank 0 makes the name that all get.
    ///
    /// Errors: variables that are wrong; a port that another program has; a program there that is not rank 0; a rank
    /// that does not come in time; other versions of NCCL.
    pub fn new(me: Member, timeout: Duration, name: impl FnOnce() -> Result<[u8; NAME]>) -> Result<(Self, [u8; NAME])> {
        let place = Place::from_env()?;
        let until = Instant::now() + timeout;
        if me.rank > 0 {
            let (rank_0, name) = follow(&place, me, until, timeout)?;
            return Ok((Self { others: vec![(0, rank_0)] }, name));
        }
        let listener = place.listen()?;
        let name = name()?;
        let others = gather(&listener, &place, me, until, timeout)?;
        let answer = [&MAGIC[..], &me.version.to_le_bytes(), &name].concat();
        for (rank, stream) in &others {
            let mut stream = stream;
            let sent = stream.write_all(&answer);
            sent.map_err(|why| Error::argument(OP, format_args!("rank {rank} has gone before the run began: {why}")))?;
        }
        Ok((Self { others }, name))
    }

    /// Returns a rank whose process has ended. Ranks other than 0 only know about rank 0.
    pub fn lost(&self) -> Option<usize> {
        lost(&self.others)
    }
}

fn lost(others: &[(usize, TcpStream)]) -> Option<usize> {
    let ended = |stream: &TcpStream| match stream.peek(&mut [0]) {
        Ok(bytes) => bytes == 0,
        Err(why) => !matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    };
    others.iter().find(|(_, stream)| ended(stream)).map(|(rank, _)| *rank)
}

/// Connection whose hello is being read.
struct Guest {
    stream: TcpStream,
    from: SocketAddr,
    bytes: Vec<u8>,
    since: Instant,
}

/// Waits for all other ranks, as rank 0. What is not one of them is sent away.
fn gather(
    listener: &TcpListener,
    place: &Place,
    me: Member,
    until: Instant,
    timeout: Duration,
) -> Result<Vec<(usize, TcpStream)>> {
    let (mut guests, mut came) = (Vec::<Guest>::new(), Vec::<(usize, TcpStream)>::new());
    let mut stranger = String::new();
    while came.len() + 1 < me.size {
        // Programs that keep connections open and say nothing must not use up what a process may open.
        while guests.len() < 2 * me.size + 16 {
            let Ok((stream, from)) = listener.accept() else { break };
            if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
                guests.push(Guest { stream, from, bytes: Vec::new(), since: Instant::now() });
            }
        }
        let mut at = 0;
        while at < guests.len() {
            let guest = &mut guests[at];
            let heard = guest.hear(me, &came);
            match heard {
                Ok(None) if guest.since.elapsed() < GREETING => at += 1,
                Ok(Some(rank)) => came.push((rank, guests.swap_remove(at).stream)),
                Ok(None) => drop(guests.swap_remove(at)),
                Err(Refused::Stranger(why)) => {
                    stranger = format!("; a program at {} was sent away: {why}", guest.from);
                    drop(guests.swap_remove(at));
                }
                Err(Refused::Version(rank, version)) => {
                    let versions = [version, me.version].map(|version| (me.text)(version as i32));
                    let mut answer = [&MAGIC[..], &OTHER_VERSION.to_le_bytes()].concat();
                    answer.extend(versions[1].bytes());
                    answer.resize(ANSWER, 0);
                    // The error counts, not if it arrives.
                    let _ = guest.stream.write_all(&answer);
                    return Err(Error::argument(OP, other_version(rank, &versions[0], &versions[1])));
                }
            }
        }
        if let Some(rank) = lost(&came) {
            return Err(Error::argument(OP, format_args!("rank {rank} has gone before the run began")));
        }
        if Instant::now() >= until {
            let missing = (1..me.size).filter(|rank| came.iter().all(|(other, _)| other != rank));
            let missing = missing.map(|rank| rank.to_string()).collect_vec();
            return Err(Error::argument(
                OP,
                format_args!(
                    "rank {} of {} did not come to {} within {} s{stranger}",
                    missing.join(", "),
                    me.size,
                    place.name(),
                    timeout.as_secs_f64()
                ),
            ));
        }
        thread::sleep(LOOK);
    }
    Ok(came)
}

fn other_version(rank: usize, own: &str, first: &str) -> String {
    format!("rank {rank} has NCCL {own}, rank 0 {first}; give all ranks the same library")
}

/// Reason to end a connection.
enum Refused {
    Stranger(String),
    Version(usize, u32),
}

impl Guest {
    /// Reads what has come; returns the rank once it is known.
    fn hear(&mut self, me: Member, came: &[(usize, TcpStream)]) -> std::result::Result<Option<usize>, Refused> {
        let stranger = |why: String| Err(Refused::Stranger(why));
        // One byte more than there may be.
        let mut bytes = [0; HELLO + 1];
        loop {
            match self.stream.read(&mut bytes[self.bytes.len()..]) {
                Ok(0) => return stranger("it closed the connection before it said its rank".to_string()),
                Ok(count) => {
                    let start = self.bytes.len();
                    self.bytes.extend_from_slice(&bytes[start..start + count]);
                }
                Err(why) if why.kind() == ErrorKind::Interrupted => {}
                Err(why) if why.kind() == ErrorKind::WouldBlock => break,
                Err(why) => return stranger(why.to_string()),
            }
            if self.bytes.len() > HELLO {
                return stranger(format!("it sent more than the {HELLO} bytes of a rank"));
            }
        }
        let known = self.bytes.len().min(MAGIC.len());
        if self.bytes[..known] != MAGIC[..known] {
            return stranger("it sent something else than a rank".to_string());
        }
        if self.bytes.len() < HELLO {
            return Ok(None);
        }
        let [rank, size, version] = [8, 12, 16].map(|at| word(&self.bytes, at));
        let (rank, size) = (rank as usize, size as usize);
        if size != me.size || rank == 0 || rank >= size || came.iter().any(|(other, _)| *other == rank) {
            return stranger(format!("it is rank {rank} of {size}, which is not expected: is it of another run?"));
        }
        match version == me.version {
            true => Ok(Some(rank)),
            false => Err(Refused::Version(rank, version)),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| bytes.get(at + byte).copied().unwrap_or(0)))
}

/// Connects to rank 0, and waits for the name.
fn follow(place: &Place, me: Member, until: Instant, timeout: Duration) -> Result<(TcpStream, [u8; NAME])> {
    let failed = |why: &dyn std::fmt::Display| {
        let name = place.name();
        Error::argument(OP, format_args!("rank {} cannot join rank 0 at {name}: {why}", me.rank))
    };
    let mut stream = connect(place, until, timeout).map_err(|why| failed(&why))?;
    let numbers = [me.rank as u32, me.size as u32, me.version].map(u32::to_le_bytes).concat();
    let mut answer = [0; ANSWER];
    let mut got = 0;
    let asked = stream.write_all(&[&MAGIC[..], &numbers].concat()).and_then(|()| stream.set_nonblocking(true));
    asked.map_err(|why| failed(&why))?;
    while got < ANSWER {
        match stream.read(&mut answer[got..]) {
            Ok(0) => {
                let why = "it closed the connection; its message says why, or else it is not rank 0 of this run: \
                           XT_NCCL_PORT sets another port";
                return Err(failed(&why));
            }
            Ok(count) => got += count,
            Err(why) if why.kind() == ErrorKind::Interrupted => {}
            Err(why) if why.kind() == ErrorKind::WouldBlock => {
                let waited = timeout.as_secs_f64();
                let why = format_args!("it did not answer within {waited} s; another rank may be missing").to_string();
                ensure!(Instant::now() < until, failed(&why));
                thread::sleep(LOOK);
            }
            Err(why) => return Err(failed(&why)),
        }
        let known = got.min(MAGIC.len());
        ensure!(
            answer[..known] == MAGIC[..known],
            failed(&"another program answered; end it, or set XT_NCCL_PORT to a free port on all ranks")
        );
    }
    let version = word(&answer, MAGIC.len());
    if version != me.version {
        let first = String::from_utf8_lossy(&answer[12..]);
        let first = first.trim_end_matches('\0').to_string();
        let first = if version == OTHER_VERSION { first } else { (me.text)(version as i32) };
        return Err(Error::argument(OP, other_version(me.rank, &(me.text)(me.version as i32), &first)));
    }
    Ok((stream, std::array::from_fn(|at| answer[12 + at])))
}

/// Connects as soon as somebody listens.
fn connect(place: &Place, until: Instant, timeout: Duration) -> std::result::Result<TcpStream, String> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let addresses = (place.host.as_str(), place.port).to_socket_addrs();
        // Name servers of a cluster may know a machine only after a moment.
        let mut said = addresses.as_ref().err().map(|why| why.to_string()).unwrap_or_default();
        for address in addresses.into_iter().flatten() {
            match TcpStream::connect_timeout(&address, left.clamp(LOOK, GREETING)) {
                // A port that nobody listens on may be given to the caller itself.
                Ok(stream) if stream.local_addr().ok() == stream.peer_addr().ok() => {}
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(|why| why.to_string())?;
                    return Ok(stream);
                }
                Err(why) => said = why.to_string(),
            }
        }
        if Instant::now() >= until {
            return Err(format!("{said} (tried for {} s)", timeout.as_secs_f64()));
        }
        thread::sleep(10 * LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> std::result::Result<String, String> {
        let get = |name: &str| variables.iter().find(|(at, _)| *at == name).map(|(_, value)| value.to_string());
        Place::of(&get).map(|place| place.name()).map_err(|why| why.to_string())
    }

    #[test]
    fn ranks_meet_on_the_port_after_that_of_torchrun() {
        assert_eq!(place(&[("MASTER_ADDR", "a"), ("MASTER_PORT", "29500")]).as_deref(), Ok("a:29501"));
        assert_eq!(place(&[("MASTER_ADDR", "a"), ("XT_NCCL_PORT", "7")]).as_deref(), Ok("a:7"));
        for (variables, words) in [
            (&[("MASTER_PORT", "1")][..], "MASTER_ADDR is not set"),
            (&[("MASTER_ADDR", "")], "MASTER_ADDR is not set"),
            (&[("MASTER_ADDR", "a")], "MASTER_PORT is not set"),
            (&[("MASTER_ADDR", "a"), ("MASTER_PORT", "x")], "in MASTER_PORT, got `x`"),
            (&[("MASTER_ADDR", "a"), ("MASTER_PORT", "65536")], "in MASTER_PORT, got `65536`"),
            (&[("MASTER_ADDR", "a"), ("MASTER_PORT", "65535")], "XT_NCCL_PORT"),
            (&[("MASTER_ADDR", "a"), ("XT_NCCL_PORT", "0")], "in XT_NCCL_PORT, got `0`"),
        ] {
            let why = place(variables).expect_err("refused");
            assert!(why.contains(words), "{why}");
        }
    }
}
