//! Bodies of any length: frames in both directions, credit, leases, and what goes wrong with them
//! (R1.5, R1.9, P3, P4; DESIGN §3, §5).

mod common;

use common::{
    AT_MOST, BREAKS, Bystander, EARLY, FLOOD, LENGTH, STUCK, TestServer, all_memory, client, eventually, stat,
};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::{Duration, Instant};

const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];

/// At every edge of slots, frames and windows.
const LENGTHS: [usize; 15] =
    [0, 1, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 16383, 16384, 16385, 65536, 65537, 300_001];

/// Different for every seed, in every byte.
fn body(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn configs(policy: WaitPolicy) -> [ClientConfig; 3] {
    let base = ClientConfig { policy, ..ClientConfig::default() };
    [
        base.clone(),
        ClientConfig { policy, ..ClientConfig::smallest() },
        ClientConfig { medium_slots: 2, large_slots: 2, ring_entries: 64, ..base },
    ]
}

/// Goal:   R1.5: a message of any length up to the limit comes back byte for byte.
/// Method: lengths at every edge of slots, frames and windows, through leases, through base slots alone, and through
///         large base slots; every policy.
#[test]
fn r1_5_messages_of_any_length_come_back() {
    for policy in ALL {
        let server = TestServer::start(policy);
        for config in configs(policy) {
            let client = IpcClient::connect_with(server.path(), &config).unwrap();
            let connection = client.open().unwrap();
            for len in LENGTHS.into_iter().filter(|len| policy != WaitPolicy::Spin || *len <= 70_000) {
                let request = body(len, len as u64);
                let answer = connection.call(MessageType::ECHO, &request).unwrap();
                assert!(answer == request, "{len} bytes under {policy:?}");
            }
        }
    }
}

/// Goal:   R4.4: every byte of a request is counted, however it came.
/// Method: an echo of each length, the counter before and after it.
#[test]
fn r4_4_bytes_of_requests_are_counted_to_the_last() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    for len in LENGTHS {
        let before = stat(&connection, "bytes_in");
        connection.call(MessageType::ECHO, &body(len, 3)).unwrap();
        assert_eq!(stat(&connection, "bytes_in") - before, len as u64);
    }
}

/// Goal:   R1.5: 10 485 760 bytes pass; one byte more is `MessageTooLarge`, and nothing else is lost.
#[test]
fn r1_5_the_longest_message_passes_and_one_byte_more_is_refused() {
    let server = TestServer::start(WaitPolicy::Handoff);
    let client = client(server.path(), WaitPolicy::Handoff);
    let connection = client.open().unwrap();
    assert_eq!(client.max_message_size(), 10_485_760);
    let mut longest = body(10_485_761, 1);
    let error = connection.call(MessageType::ECHO, &longest).unwrap_err();
    assert!(matches!(error, IpcError::MessageTooLarge(10_485_760)), "{error}");
    let error = connection.submit(MessageType::ECHO, &longest, &CallOptions::default()).unwrap_err();
    assert!(matches!(error, IpcError::MessageTooLarge(10_485_760)), "{error}");
    longest.pop();
    assert!(connection.call(MessageType::ECHO, &longest).unwrap() == longest);
    assert_eq!(connection.call(MessageType::ECHO, b"short").unwrap(), b"short");
}

/// The next answer, or frame of one.
fn next(client: &IpcClient) -> doorbell::Answer<'_> {
    loop {
        // Room to send more ends a wait, too.
        assert!(client.wait(Some(Duration::from_secs(30))).unwrap(), "no answer within 30 s");
        if let Some(answer) = client.poll().unwrap() {
            return answer;
        }
    }
}

/// Goal:   R1.5, R1.9: a request of unknown length is sent piece by piece, its answer comes frame by frame, in order and
///         with an end; nobody is given more room than there is.
/// Method: a body of 300 kB in odd pieces while frames of its echo are taken; sessions with and without leases.
#[test]
fn r1_5_r1_9_a_body_of_unknown_length_streams_both_ways() {
    for policy in ALL {
        let server = TestServer::start(policy);
        for config in configs(policy) {
            let client = IpcClient::connect_with(server.path(), &config).unwrap();
            let connection = client.open().unwrap();
            let request = body(300_007, 5);
            let options = CallOptions { pieces: true, tag: 9, ..CallOptions::default() };
            let call = connection.start(MessageType::ECHO, None, &options).unwrap();
            let (mut sent, mut answer, mut ended) = (0, Vec::new(), false);
            while !ended {
                if sent < request.len() {
                    let end = request.len().min(sent + 777);
                    sent += client.send(call, &request[sent..end]).unwrap();
                    if sent == request.len() {
                        client.finish(call).unwrap();
                        assert!(matches!(client.send(call, b"more"), Err(IpcError::BodyFinished)));
                    }
                }
                client.flush().unwrap();
                while let Some(frame) = client.poll().unwrap() {
                    assert_eq!((frame.tag(), frame.id()), (9, call));
                    frame.result().unwrap();
                    answer.extend(frame.to_vec().unwrap());
                    ended = frame.is_last();
                }
            }
            assert!(answer == request, "{policy:?}");
            assert!(matches!(client.send(call, b"late"), Err(IpcError::NoSuchCall)));
            assert_eq!(client.in_flight(), 0);
        }
    }
}

/// Goal:   P4: a frame that its reader still has is not written over, in whatever order frames are dropped.
/// Method: frames are kept in threes and dropped newest first; each is read again before it goes.
#[test]
fn p4_frames_that_are_kept_stay_as_they_are() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    let request = body(600_000, 11);
    let options = CallOptions { pieces: true, reply_capacity: request.len(), ..CallOptions::default() };
    // On a busy machine a call begins on base slots before its lease has come: its window would have one frame, and
    // whoever keeps that waits for ever. A call before it leaves a lease behind.
    eventually("there is memory for windows of four frames", || {
        assert!(connection.call(MessageType::ECHO, &request[..200_000]).unwrap() == request[..200_000]);
        stat(&connection, "leased_bytes") >= 8 * 16_384
    });
    connection.submit(MessageType::ECHO, &request, &options).unwrap();
    let (mut at, mut ended) = (0, false);
    let mut kept = std::collections::VecDeque::new();
    while !ended || !kept.is_empty() {
        if !ended && kept.len() < 3 {
            let frame = next(&client);
            ended = frame.is_last();
            let len = frame.len();
            kept.push_back((frame, at, len));
            at += len;
            continue;
        }
        while let Some((frame, at, len)) = kept.pop_back() {
            assert!(frame.to_vec().unwrap() == request[at..at + len]);
        }
    }
    assert_eq!(at, request.len());
    let second = connection.call(MessageType::ECHO, b"on").unwrap();
    assert_eq!(second, b"on");
}

/// Goal:   P6: the end of a connection does not overtake its long calls that wait for memory to begin with.
/// Method: more long calls at once than there is memory for, on connections that are dropped at once; all are answered, and
///         the session goes on.
#[test]
fn p6_a_close_does_not_overtake_calls_that_have_not_begun() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let request = body(200_000, 5);
    for _ in 0..5 {
        let mut sent = 0;
        for _ in 0..3 {
            let connection = client.open().unwrap();
            while connection.submit(MessageType::ECHO, &request, &CallOptions::default()).is_ok() && sent < 3
            {
                sent += 1;
            }
        }
        while client.in_flight() > 0 {
            assert!(next(&client).to_vec().unwrap() == request);
        }
    }
    assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"on").unwrap(), b"on");
    let metrics = server.stop();
    assert_eq!(metrics.ended(doorbell::protocol::handshake::DisconnectReason::ProtocolViolation), 0);
}

/// Goal:   a body whose length was announced is exactly that long: more or less is an error of the sender's, and nothing
///         wrong is sent.
#[test]
fn a_body_is_as_long_as_it_was_announced() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    let call = connection.start(MessageType::ECHO, Some(5), &CallOptions::default()).unwrap();
    eventually("there is room", || client.send(call, b"123").unwrap() == 3);
    let short = client.finish(call).unwrap_err();
    assert!(matches!(short, IpcError::BodyLength { announced: 5, sent: 3 }), "{short}");
    let mut long = Ok(0);
    eventually("the rest has gone", || {
        long = client.send(call, b"45678");
        !matches!(long, Ok(0))
    });
    assert_eq!(long.unwrap(), 2, "no more than was announced");
    assert!(matches!(client.send(call, b"678"), Err(IpcError::BodyFinished)));
    assert!(matches!(client.send_with(call, |w| w.write(b"6")), Err(IpcError::BodyFinished)));
    assert_eq!(next(&client).to_vec().unwrap(), b"12345");
    assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
}

/// Goal:   DESIGN §3: long bodies of many connections interleave, through one session and through several, and each
///         comes back right.
/// Method: 12 bodies of different lengths at once from one client, three such clients on threads of their own.
#[test]
fn many_bodies_at_once_come_back_each_to_its_own() {
    for policy in ALL {
        let server = TestServer::start_with(ServerConfig { policy, ..ServerConfig::default() });
        std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let path = server.path();
                scope.spawn(move || {
                    let config = ClientConfig { policy, small_slots: 32, ..ClientConfig::default() };
                    let client = IpcClient::connect_with(path, &config).unwrap();
                    let connections: Vec<_> = (0..12).map(|_| client.open().unwrap()).collect();
                    let request = |tag: u64| body(20_000 + 9_973 * tag as usize, tag * 3 + thread);
                    for (tag, connection) in connections.iter().enumerate() {
                        let options = CallOptions { tag: tag as u64, ..CallOptions::default() };
                        let request = request(tag as u64);
                        eventually("its lane has room for what goes before it", || {
                            match connection.submit(MessageType::ECHO, &request, &options) {
                                Err(IpcError::WouldBlock) => client.flush().map(|()| false).unwrap(),
                                submitted => submitted.is_ok(),
                            }
                        });
                    }
                    for _ in 0..12 {
                        let answer = next(&client);
                        assert!(answer.to_vec().unwrap() == request(answer.tag()));
                    }
                    assert_eq!(client.in_flight(), 0);
                });
            }
        });
    }
}

/// Goal:   trap 5, R2.6: a call is cancelled in mid-body although rings and windows are full, is answered once, and its
///         slots can be used again.
/// Method: a body sent as far as there is room while its answer is not taken, so that everything stands still; cancel.
#[test]
fn r2_6_trap5_a_call_is_cancelled_in_mid_body_when_everything_is_full() {
    for policy in ALL {
        let server = TestServer::start(policy);
        for config in configs(policy) {
            let client = IpcClient::connect_with(server.path(), &config).unwrap();
            let connection = client.open().unwrap();
            for round in 0..5u64 {
                let options = CallOptions { pieces: true, tag: round, ..CallOptions::default() };
                let call = connection.start(MessageType::ECHO, Some(5 << 20), &options).unwrap();
                let piece = body(10_000, round);
                let mut stuck = 0;
                eventually("nothing goes any more", || {
                    let sent = client.send(call, &piece).unwrap();
                    client.flush().unwrap();
                    stuck = if sent == 0 { stuck + 1 } else { 0 };
                    stuck > 300
                });
                client.cancel(call);
                client.flush().unwrap();
                let end = loop {
                    let frame = next(&client);
                    if frame.is_last() {
                        break frame.result();
                    }
                };
                assert!(matches!(end, Err(IpcError::Cancelled)), "{end:?}");
                let request = body(40_000, round);
                assert!(connection.call(MessageType::ECHO, &request).unwrap() == request);
                assert_eq!(client.in_flight(), 0);
            }
        }
    }
}

/// Goal:   R1.9: a reader that stops, stops its own answer alone.
/// Method: an answer of 2 MiB of which nothing is taken; calls on the same session and another go on; then it is taken.
#[test]
fn r1_9_a_reader_that_stops_stops_nobody_else() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        let client =
            IpcClient::connect_with(server.path(), &ClientConfig { policy, ..ClientConfig::default() })
                .unwrap();
        let (slow, quick) = (client.open().unwrap(), client.open().unwrap());
        let options = CallOptions { pieces: true, tag: 1, reply_capacity: 2 << 20, ..CallOptions::default() };
        slow.submit(FLOOD, b"", &options).unwrap();
        for i in 0..200u32 {
            assert_eq!(quick.call(MessageType::ECHO, &i.to_le_bytes()).unwrap(), i.to_le_bytes());
        }
        bystander.check("a reader that stopped");
        let mut len = 0;
        loop {
            let frame = next(&client);
            assert_eq!(frame.tag(), 1);
            assert!(frame.to_vec().unwrap().iter().all(|byte| *byte == 7));
            len += frame.len();
            if frame.is_last() {
                break;
            }
        }
        assert_eq!(len, 2 << 20);
    }
}

/// Goal:   F58: a long call that its caller gives up is cancelled, and nothing of it meets a later one.
/// Method: time-outs from nothing to enough, then a good call each time.
#[test]
fn f58_a_long_call_that_timed_out_leaves_nothing_behind() {
    let server = TestServer::start(WaitPolicy::Handoff);
    for config in configs(WaitPolicy::Handoff) {
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        for round in 0..40u64 {
            let request = body(200_000, round);
            let timeout = Some(Duration::from_micros(round * 20));
            let options = CallOptions { timeout, ..CallOptions::default() };
            match connection.call_with(MessageType::ECHO, &request, &options, |answer| answer.to_vec()) {
                Ok(answer) => assert!(answer.unwrap() == request),
                Err(error) => assert!(matches!(error, IpcError::Timeout), "{error}"),
            }
            let request = body(30_000, round + 1000);
            assert!(connection.call(MessageType::ECHO, &request).unwrap() == request);
        }
        eventually("all slots are back", || {
            drop(client.poll().unwrap());
            client.in_flight() == 0
        });
    }
}

/// Goal:   a small call does not wait behind a long one that waits for memory to be put together in; the long ones get
///         it one after the other.
/// Method: a server with room for one body at a time; one is begun and not finished, another one waits behind it,
///         small calls pass both.
#[test]
fn s7_a_small_call_passes_long_ones_that_wait_for_memory() {
    let config = ServerConfig { reactors: 1, body_memory: 1 << 20, ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let clients = [(); 2].map(|()| client(server.path(), WaitPolicy::Block));
    let [first, second] = &clients;
    let connections = [first.open().unwrap(), second.open().unwrap()];
    let len = 1 << 20;
    let request = body(len, 1);
    let options = CallOptions::default();
    let begun = connections[0].start(LENGTH, Some(len as u64), &options).unwrap();
    let mut sent = 0;
    eventually("half of it has gone", || {
        sent += first.send(begun, &request[sent..len / 2]).unwrap();
        first.flush().unwrap();
        sent == len / 2
    });
    let waits = connections[1].start(LENGTH, Some(len as u64), &options).unwrap();
    eventually("the other one waits", || {
        second.send(waits, &request[..1]).unwrap();
        second.flush().unwrap();
        stat(&connections[0], "bodies_waited") > 0
    });
    for connection in &connections {
        assert_eq!(connection.call(MessageType::ECHO, b"small").unwrap(), b"small");
    }
    // The one that does nothing with its memory while another waits for it is ended.
    let end = next(first).result();
    assert!(matches!(end, Err(IpcError::MemoryTakenBack)), "{end:?}");
    second.cancel(waits);
    let end = next(second).result();
    assert!(matches!(end, Err(IpcError::Cancelled)), "{end:?}");
    let answer = connections[1].call(LENGTH, &request).unwrap();
    assert_eq!(answer, (len as u64).to_le_bytes());
}

/// Goal:   a handler for whole bodies gets them whole and is asked for no longer ones than it takes; failures of both
///         kinds of handlers are answered and the connection goes on (R3.2).
#[test]
fn r3_2_long_bodies_meet_every_kind_of_handler() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for len in [100_000, 1 << 20] {
            let request = body(len, 3);
            assert_eq!(connection.call(LENGTH, &request).unwrap(), (len as u64).to_le_bytes());
            let refused = connection.call(common::REFUSE, &request).unwrap_err();
            assert!(
                matches!(&refused, IpcError::Decode(why) if *why == format!("{len} bytes make no sense"))
            );
            assert!(matches!(connection.call(common::PANIC, &request), Err(IpcError::HandlerPanic)));
            assert!(matches!(
                connection.call(MessageType(99), &request),
                Err(IpcError::UnknownMessageType(_))
            ));
            let short = connection.call(AT_MOST, &request);
            assert!(matches!(short, Err(IpcError::MessageTooLarge(65_536))), "{short:?}");
            let stuck = connection.call(STUCK, &request).unwrap_err();
            assert!(
                matches!(&stuck, IpcError::Handler(why) if why.contains("neither took nor wrote")),
                "{stuck}"
            );
            let early = connection.call(EARLY, &request).unwrap();
            assert_eq!(early, b"enough");
            assert!(matches!(connection.call(BREAKS, &request), Err(IpcError::HandlerPanic)));
            assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
        }
        assert_eq!(connection.call(AT_MOST, &body(65_536, 1)).unwrap(), 65_536u64.to_le_bytes());
        assert_eq!(client.in_flight(), 0);
    }
}

/// Goal:   R5.3: leases that nobody uses any more go back to the server, and its memory to the kernel.
/// Method: a long call; then nothing, until the counter of leased bytes is zero.
#[test]
fn r5_3_f59_unused_leases_go_back() {
    let server = TestServer::start(WaitPolicy::Block);
    let watcher = client(server.path(), WaitPolicy::Block);
    let watched = watcher.open().unwrap();
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    let before = client.shared_bytes().unwrap();
    let request = body(1 << 20, 1);
    for _ in 0..3 {
        assert!(connection.call(MessageType::ECHO, &request).unwrap() == request);
        assert!(stat(&watched, "leased_bytes") > 0 && client.shared_bytes().unwrap() > before);
        eventually("the leases have gone", || stat(&watched, "leased_bytes") == 0);
        assert_eq!(client.shared_bytes().unwrap(), before);
    }
}

/// Goal:   R1.9, P3: asking for memory that does not come takes no slot which the call that waits for it needs.
/// Method: no memory; a session with four slots, one of which an answer has that is kept; a long call needs two of the others,
///         and one stays free.
#[test]
fn r1_9_p3_a_wish_for_memory_stops_no_call() {
    let server = TestServer::start_with(ServerConfig { reactors: 1, ..ServerConfig::default() });
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    let _held = all_memory(server.path());
    connection.submit(MessageType::ECHO, b"kept", &CallOptions::default()).unwrap();
    let kept = next(&client);
    let request = body(100_000, 1);
    let patient = CallOptions { timeout: Some(Duration::from_secs(30)), ..CallOptions::default() };
    let answer = connection.call_with(MessageType::ECHO, &request, &patient, |reply| reply.to_vec());
    assert!(answer.unwrap().unwrap() == request);
    assert_eq!(kept.to_vec().unwrap(), b"kept");
}

/// Goal:   R1.9, DESIGN §5: where the budget is used up a session still gets on with its own slots; its caller sees that
///         it waits, and gets leases once there is memory.
/// Method: a budget that one session's slots use up but for less than a lease; long calls of another; then the first
///         goes.
#[test]
fn r1_9_without_memory_to_lease_calls_go_on_in_base_slots() {
    let server = TestServer::start_with(ServerConfig { reactors: 1, ..ServerConfig::default() });
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    let held = all_memory(server.path());
    assert_eq!(client.waits_for_memory(), None);
    for seed in 0..3 {
        let request = body(100_000, seed);
        assert!(connection.call(MessageType::ECHO, &request).unwrap() == request);
        assert!(client.waits_for_memory().is_some(), "the lease was not to be had");
    }
    drop(held);
    eventually("a lease has come", || {
        let request = body(50_000, 7);
        assert!(connection.call(MessageType::ECHO, &request).unwrap() == request);
        client.waits_for_memory().is_none()
    });
}

/// Goal:   R1.9, DESIGN §5: whoever waits on the descriptor gets his long call answered where there is no memory to lease, with
///         a limit to his waits or without: the call begins though nothing comes that says so.
/// Method: no memory; the recipes of `prepare_to_wait` and of `prepare_to_sleep` to the letter, by poll(2); a whole answer, and
///         one in pieces; of requests for leases of either class.
#[test]
fn r1_9_who_waits_on_the_descriptor_gets_on_without_memory_to_lease() {
    let server = TestServer::start_with(ServerConfig { reactors: 1, ..ServerConfig::default() });
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    let _held = all_memory(server.path());
    let without_limit = || (!client.prepare_to_wait().unwrap()).then_some(None);
    let with_limit = || Some(client.prepare_to_sleep().unwrap());
    let recipes: [&dyn Fn() -> Option<Option<Duration>>; 2] = [&without_limit, &with_limit];
    for (recipe, prepare) in recipes.iter().enumerate() {
        for (len, pieces) in [(2000, false), (2000, true), (100_000, false), (100_000, true)] {
            let request = body(len, len as u64);
            let options = CallOptions { pieces, ..CallOptions::default() };
            connection.submit(MessageType::ECHO, &request, &options).unwrap();
            let (mut answer, mut over) = (Vec::new(), false);
            while !over {
                while let Some(frame) = client.poll().unwrap() {
                    answer.extend(frame.to_vec().unwrap());
                    over = frame.is_last();
                }
                if over {
                    break;
                }
                let Some(limit) = prepare() else { continue };
                assert!(limit.is_none_or(|limit| limit <= Duration::from_millis(5)), "{limit:?}");
                // For ever, in a test.
                let at_most = Timespec::try_from(limit.unwrap_or(Duration::from_secs(30))).unwrap();
                let ready = poll(&mut [PollFd::new(&client, PollFlags::IN)], Some(&at_most)).unwrap();
                assert!(
                    ready > 0 || limit.is_some(),
                    "recipe {recipe}, {len} bytes, pieces {pieces}: never sent"
                );
            }
            assert!(answer == request, "recipe {recipe}, {len} bytes, pieces {pieces}");
            assert!(client.waits_for_memory().is_some(), "the lease was not to be had");
        }
    }
}

/// Goal:   P3: more long calls at once than a session's ring admits calls are all answered: they do not stop each other.
/// Method: a ring of eight entries and far more slots; as many calls as there are names for, none of whose frames fit otherwise.
#[test]
fn p3_long_calls_leave_their_ring_room_for_their_frames() {
    let server = TestServer::start(WaitPolicy::Block);
    let config = ClientConfig { ring_entries: 8, small_slots: 40, lease_pages: 0, ..ClientConfig::default() };
    let client = IpcClient::connect_with(server.path(), &config).unwrap();
    let connection = client.open().unwrap();
    let requests: Vec<_> = (0..16).map(|seed| body(20_000, seed)).collect();
    for (request, tag) in requests.iter().zip(0..) {
        let options = CallOptions { tag, ..CallOptions::default() };
        connection.submit(MessageType::ECHO, request, &options).unwrap();
    }
    for _ in &requests {
        let answer = next(&client);
        assert!(answer.to_vec().unwrap() == requests[answer.tag() as usize]);
    }
}

/// Goal:   R5.3, DESIGN §5: sessions come whatever is leased: leases only speed things up.
/// Method: sessions begin long calls until one has to wait for memory; others connect at once, and are answered.
#[test]
fn r5_3_a_session_comes_whatever_is_leased() {
    let server = TestServer::start_with(ServerConfig { reactors: 1, ..ServerConfig::default() });
    let watcher = client(server.path(), WaitPolicy::Block);
    let watched = watcher.open().unwrap();
    let len = 10 << 20;
    let options = CallOptions { reply_capacity: len, ..CallOptions::default() };
    let holders = [(); 12].map(|()| client(server.path(), WaitPolicy::Block));
    let holding: Vec<_> = holders.iter().map(|client| client.open().unwrap()).collect();
    for connection in holding.iter().cycle().take(2 * holders.len()) {
        connection.start(LENGTH, Some(len as u64), &options).unwrap();
    }
    eventually("somebody waits for memory", || {
        holders.iter().for_each(|client| assert!(client.poll().unwrap().is_none()));
        stat(&watched, "leases_waiting") > 0
    });
    let late = [(); 8].map(|()| IpcClient::connect(server.path()).unwrap());
    for client in &late {
        assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"in").unwrap(), b"in");
    }
}

/// Waits until as much shared memory of a session's exists as `condition` says.
fn eventually_has(client: &IpcClient, what: &str, condition: impl Fn(u64) -> bool) {
    eventually(what, || condition(client.shared_bytes().unwrap()));
}

/// Goal:   F59: a lease may lie where another one was that the server has taken back without the client's knowing,
///         whether answers in the old one have been done with or not.
/// Method: a client has a lease of 4 KiB slots, asks for another of 16 KiB slots and has to wait; others, who wait too,
///         have the old one taken back; then they go, and the new one comes to the same place. Once with nothing in the
///         old one, once with an answer in it that the caller still holds, which is gone then.
#[test]
fn f59_a_lease_may_lie_where_one_was_that_has_gone() {
    for holds in [false, true] {
        let sweep_interval = std::time::Duration::from_millis(250);
        let base = ServerConfig { policy: WaitPolicy::Block, reactors: 1, ..ServerConfig::default() };
        let server = TestServer::start_with(ServerConfig { sweep_interval, memory_budget: 2 << 20, ..base });
        let probe = client(server.path(), WaitPolicy::Block);
        let probe = probe.open().unwrap();
        // An answer that is kept leaves enough slots to ask for a lease.
        let config = ClientConfig { policy: WaitPolicy::Block, small_slots: 8, ..ClientConfig::default() };
        let patient = IpcClient::connect_with(server.path(), &config).unwrap();
        let without = patient.shared_bytes().unwrap();
        let connection = patient.open().unwrap();
        let small = body(3000, 1);
        assert_eq!(connection.call(MessageType::ECHO, &small).unwrap(), small);
        assert_eq!(patient.shared_bytes().unwrap(), without + (8 << 10), "it has a lease");
        let mut held = None;
        if holds {
            connection.submit(MessageType::ECHO, &small, &CallOptions::default()).unwrap();
            assert!(patient.wait(None).unwrap());
            held = patient.poll().unwrap();
            assert_eq!(held.as_ref().unwrap().len(), 3000);
        }

        let config =
            ClientConfig { ring_entries: 128, small_slots: 64, lease_pages: 1000, ..ClientConfig::default() };
        let greedy = IpcClient::connect_with(server.path(), &config).unwrap();
        let many = greedy.open().unwrap().detach();
        while stat(&probe, "leases_waited") == 0 {
            greedy.attached(many).start(MessageType::ECHO, Some(1 << 20), &CallOptions::default()).unwrap();
            eventually("a lease is granted, or waits", || {
                assert!(greedy.poll().unwrap().is_none());
                greedy.waits_for_memory().is_none() || stat(&probe, "leases_waited") > 0
            });
        }
        let large = body(100_000, 2);
        let id = connection.start(MessageType::ECHO, Some(100_000), &CallOptions::default()).unwrap();
        patient.flush().unwrap();
        // Only the old lease is no multiple of 16 KiB. The others stand still, too: what is taken from them may come at
        // once.
        let is_gone = |bytes: u64| (bytes - without).is_multiple_of(16 << 10);
        eventually_has(&patient, "the old lease has gone", is_gone);
        drop(greedy);
        eventually_has(&patient, "the new lease has come", |bytes| is_gone(bytes) && bytes > without);

        let (mut sent, mut answer) = (0, None);
        eventually("the long call is answered", || {
            if sent < large.len() {
                sent += patient.send(id, &large[sent..]).unwrap();
            }
            answer = patient.poll().unwrap().map(|reply| reply.to_vec().unwrap());
            answer.is_some()
        });
        assert!(answer.unwrap() == large);
        if let Some(held) = held {
            assert!(matches!(held.to_vec(), Err(IpcError::MemoryTakenBack)));
        }
        assert!(connection.call(MessageType::ECHO, &large).unwrap() == large);
    }
}

/// Goal:   R2.8, P3: long calls of one session share its leases: one that finds all of them in use waits for them about as
///         long as frames of one base slot each would cost it, here 50 ms.
/// Method: two calls hold all leases; a third is made and has heard that there is no room for more, and they are cancelled. Its
///         answer comes in frames of leased slots. An attempt in which one of the two got none, or this thread stood still, is
///         made again.
#[test]
fn r2_8_p3_a_long_call_waits_for_leases_that_others_are_about_to_give_back() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    let len = 10 << 20;
    let request = body(len, 3);
    let options = CallOptions { pieces: true, reply_capacity: len, ..CallOptions::default() };
    let holds_leases = |call| {
        eventually("it has begun", || client.send(call, b"x").unwrap() == 1);
        client.send(call, &request[..4 << 10]).unwrap() == 4 << 10
    };
    eventually("an attempt is not disturbed", || {
        let held = [(); 2].map(|()| connection.start(LENGTH, Some(len as u64), &options).unwrap());
        let have_leases = held.map(holds_leases);
        let begun = Instant::now();
        let third = connection.submit(MessageType::ECHO, &request, &options).unwrap();
        for _ in 0..4 {
            assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
        }
        held.into_iter().for_each(|call| client.cancel(call));
        client.flush().unwrap();
        let disturbed = have_leases.contains(&false) || begun.elapsed() > Duration::from_millis(20);
        let (mut ended, mut frame_len) = (0, 0);
        while ended < 3 {
            let frame = next(&client);
            ended += usize::from(frame.is_last());
            if frame.id() == third {
                frame_len = frame.len().max(frame_len);
            } else {
                assert!(matches!(frame.result(), Err(IpcError::Cancelled)));
            }
        }
        assert!(disturbed || frame_len == 16 << 10, "frames of {frame_len} bytes");
        !disturbed
    });
}
