//! ZMTP 3.0 (ZeroMQ's RFC 23), as far as sockets need it that others connect to: the greeting, NULL security, messages
//! and commands.
//!
//! Invariant: what a peer sends is read up to fixed sizes and times alone, so that nobody who reaches the port costs
//! more than a small buffer. An older protocol is refused. Of our own, because the library there is takes memory as a
//! peer's frame asks for it.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the peer speaks no ZMTP")]
    NoZmtp,
    #[error("the peer speaks ZMTP {0}, and 3.0 or newer is needed")]
    Older(u8),
    #[error("the peer asks for other security than NULL")]
    Security,
    #[error("the peer is no socket that goes with {0}")]
    Unfit(&'static str),
    #[error("a frame is not as it should be, or too large")]
    Frame,
    #[error("the peer takes too long")]
    Slow,
}

/// What a socket is to its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    Pub,
    Router,
}

/// What a peer sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    Message(Vec<Vec<u8>>),
    Command { name: Vec<u8>, body: Vec<u8> },
}

pub struct Reader(BufReader<OwnedReadHalf>);

pub struct Writer {
    stream: OwnedWriteHalf,
    buffer: Vec<u8>,
}

const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// For a peer to take some of a message.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// Of a frame that a peer sends: topics and numbers.
const MAX_FRAME_BYTES: u64 = 4096;
const MAX_FRAMES: usize = 8;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

impl SocketKind {
    fn name(self) -> &'static str {
        match self {
            SocketKind::Pub => "PUB",
            SocketKind::Router => "ROUTER",
        }
    }

    fn goes_with(self, other: &[u8]) -> bool {
        match self {
            SocketKind::Pub => [&b"SUB"[..], b"XSUB"].contains(&other),
            SocketKind::Router => [&b"REQ"[..], b"DEALER", b"ROUTER"].contains(&other),
        }
    }
}

/// Greets a peer that has connected.
pub async fn open(stream: TcpStream, kind: SocketKind) -> Result<(Reader, Writer), ZmtpError> {
    // Without the option batches only come later.
    let _ = stream.set_nodelay(true);
    let (read, write) = stream.into_split();
    let mut reader = Reader(BufReader::new(read));
    let mut writer = Writer { stream: write, buffer: Vec::new() };
    let greeted = timeout(HANDSHAKE_TIME, greet(&mut reader, &mut writer, kind)).await;
    greeted.map_err(|_| ZmtpError::Slow)??;
    Ok((reader, writer))
}

async fn greet(reader: &mut Reader, writer: &mut Writer, kind: SocketKind) -> Result<(), ZmtpError> {
    let mut greeting = [0; 64];
    (greeting[0], greeting[8], greeting[9], greeting[10]) = (0xff, 1, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    writer.stream.write_all(&greeting).await?;
    // An older peer sends no more than this, and waits.
    let mut theirs = [0; 64];
    reader.0.read_exact(&mut theirs[..11]).await?;
    match theirs {
        _ if theirs[0] != 0xff || theirs[9] != 0x7f => return Err(ZmtpError::NoZmtp),
        // 1 is ZMTP 2.0.
        _ if theirs[10] < 3 => return Err(ZmtpError::Older(if theirs[10] == 0 { 1 } else { 2 })),
        _ => reader.0.read_exact(&mut theirs[11..]).await?,
    };
    if theirs[12..32] != greeting[12..32] {
        return Err(ZmtpError::Security);
    }
    let name = kind.name();
    writer.command("READY", &property(b"Socket-Type", name.as_bytes())).await?;
    let Incoming::Command { name: command, body } = reader.read().await? else { return Err(ZmtpError::Frame) };
    let socket = socket_type(&body).filter(|_| command == b"READY");
    match socket.is_some_and(|socket| kind.goes_with(socket)) {
        true => Ok(()),
        false => Err(ZmtpError::Unfit(name)),
    }
}

fn property(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[name.len() as u8], name, &(value.len() as u32).to_be_bytes(), value].concat()
}

/// Of the properties in a READY command.
fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    loop {
        let (&length, rest) = properties.split_first()?;
        let (name, rest) = rest.split_at_checked(length.into())?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
}

impl Reader {
    /// Not to be given up halfway.
    pub async fn read(&mut self) -> Result<Incoming, ZmtpError> {
        let mut frames = Vec::new();
        loop {
            let flags = self.0.read_u8().await?;
            let length = match flags & LONG {
                0 => self.0.read_u8().await?.into(),
                _ => self.0.read_u64().await?,
            };
            let is_command = flags & COMMAND != 0;
            let is_wrong =
                flags & !(MORE | LONG | COMMAND) != 0 || is_command && (flags & MORE != 0 || !frames.is_empty());
            if is_wrong || length > MAX_FRAME_BYTES || frames.len() == MAX_FRAMES {
                return Err(ZmtpError::Frame);
            }
            let mut frame = vec![0; length as usize];
            self.0.read_exact(&mut frame).await?;
            if is_command {
                let (&length, rest) = frame.split_first().ok_or(ZmtpError::Frame)?;
                let (name, body) = rest.split_at_checked(length.into()).ok_or(ZmtpError::Frame)?;
                return Ok(Incoming::Command { name: name.to_vec(), body: body.to_vec() });
            }
            frames.push(frame);
            if flags & MORE == 0 {
                return Ok(Incoming::Message(frames));
            }
        }
    }
}

impl Writer {
    pub async fn message(&mut self, frames: &[&[u8]]) -> Result<(), ZmtpError> {
        for (index, frame) in frames.iter().enumerate() {
            let more = if index + 1 < frames.len() { MORE } else { 0 };
            self.put(more, &[frame]);
        }
        self.send().await
    }

    pub async fn command(&mut self, name: &str, body: &[u8]) -> Result<(), ZmtpError> {
        self.put(COMMAND, &[&[name.len() as u8], name.as_bytes(), body]);
        self.send().await
    }

    fn put(&mut self, flags: u8, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        match u8::try_from(length) {
            Ok(length) => self.buffer.extend([flags, length]),
            Err(_) => {
                self.buffer.push(flags | LONG);
                self.buffer.extend((length as u64).to_be_bytes());
            }
        }
        parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
    }

    async fn send(&mut self) -> Result<(), ZmtpError> {
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            let num_bytes = timeout(WRITE_TIME, self.stream.write(rest)).await.map_err(|_| ZmtpError::Slow)??;
            rest = &rest[num_bytes..];
        }
        self.buffer.clear();
        Ok(())
    }
}
