//! Calls end to end, through a real socket and a real segment: what is answered, in which order, and what
//! happens when something does not fit, is too late, is cancelled or has no room.

mod common;

use common::{COUNT, FLOOD, GATE, PANIC, REFUSE, State, TestServer, client, eventually, stat};
use doorbell::{
    CallOptions, ClientConfig, Connection, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy,
};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];
const PLAIN: CallOptions = CallOptions {
    tag: 0,
    timeout: None,
    deadline: None,
    reply_capacity: 0,
    idempotent: false,
    pieces: false,
    traceparent: None,
};

fn tagged(tag: u64) -> CallOptions {
    CallOptions { tag, ..PLAIN }
}

/// The number in an answer of COUNT or GATE.
fn number(answer: &[u8]) -> u64 {
    u64::from_le_bytes(answer.try_into().unwrap())
}

/// Waits for the next answer of pipelined calls: its tag and its bytes, or why there are none.
fn next(client: &IpcClient) -> (u64, Result<Vec<u8>, IpcError>) {
    loop {
        if let Some(answer) = client.poll().unwrap() {
            return (answer.tag(), answer.result().and_then(|_| answer.to_vec()));
        }
        client.wait(None).unwrap();
    }
}

/// Submits a gated call and waits until its handler holds the reactor.
fn hold(server: &TestServer, connection: &Connection<'_>, tag: u64) {
    let before = server.entered();
    connection.submit(GATE, b"", &tagged(tag)).unwrap();
    connection.client().flush().unwrap();
    eventually("the gate holds the reactor", || server.entered() == before + 1);
}

fn counted(state: &State) -> u64 {
    state.counted.load(SeqCst)
}

/// Goal:   a body arrives and comes back as it is, whatever its length and the slot class it takes.
/// Method: lengths at and around each class's edge, contents that differ by length.
#[test]
fn r1_1_an_echo_comes_back_byte_for_byte_at_every_length() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for len in [0, 1, 7, 8, 1023, 1024, 1025, 4096, 4097, 16383, 16384] {
            let request: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
            assert_eq!(
                connection.call(MessageType::ECHO, &request).unwrap(),
                request,
                "{len} bytes, {policy:?}"
            );
        }
    }
}

/// Goal:   bytes are bytes: nothing is decoded on the way (trap 16).
/// Method: every byte value, broken UTF-8, surrogates, a lone continuation byte, zeros at either end.
#[test]
fn trap16_bytes_that_are_no_text_come_back_unchanged() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    let all: Vec<u8> = (0..=255).collect();
    for body in [&all[..], b"\xff\xfe\xfd", b"\xed\xa0\x80", b"\x80", b"\0a\0", b"\xef\xbf\xbd", b"\xc3\x28"]
    {
        assert_eq!(connection.call(MessageType::ECHO, body).unwrap(), body);
    }
}

/// Goal:   two requests are two messages, however close together (trap 4).
/// Method: several submitted before one flush, of lengths that would merge or tear; each answer is its own.
#[test]
fn trap4_requests_sent_together_stay_apart() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for _ in 0..20 {
            let bodies: [&[u8]; 5] = [b"{\"a\":1}", b"", b"{\"a\":1}{\"a\":1}", b"{", b"}"];
            for (tag, body) in bodies.iter().enumerate() {
                connection.submit(MessageType::ECHO, body, &tagged(tag as u64)).unwrap();
            }
            for (tag, body) in bodies.iter().enumerate() {
                let (answered, answer) = next(&client);
                assert_eq!((answered, answer.unwrap()), (tag as u64, body.to_vec()));
            }
        }
    }
}

/// Goal:   nothing is a message, too.
/// Method: empty requests to every kind of handler; an empty answer.
#[test]
fn s9_a_zero_length_call_is_a_call() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        assert_eq!(connection.call(MessageType::PING, b"").unwrap(), b"");
        assert_eq!(connection.call(MessageType::ECHO, b"").unwrap(), b"");
        assert_eq!(number(&connection.call(COUNT, b"").unwrap()), 1);
        let refused = connection.call(REFUSE, b"").unwrap_err();
        assert!(matches!(&refused, IpcError::Decode(why) if why == "0 bytes make no sense"), "{refused}");
    }
}

/// Goal:   an unknown type is answered with its number and the connection goes on (trap 18).
/// Method: holes in the table, its edge and far beyond, each followed by a good call; pipelined, too.
#[test]
fn r1_4_an_unknown_type_is_answered_and_the_connection_goes_on() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for unknown in [0, 6, 17, 255, 319, 320, 1 << 20, u32::MAX].map(MessageType) {
            let error = connection.call(unknown, b"body").unwrap_err();
            assert!(matches!(error, IpcError::UnknownMessageType(t) if t == unknown), "{error}");
            assert!(error.to_string().contains(&unknown.to_string()));
            assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
        }
        connection.submit(MessageType::ECHO, b"before", &tagged(1)).unwrap();
        connection.submit(MessageType(99), b"", &tagged(2)).unwrap();
        connection.submit(MessageType::ECHO, b"after", &tagged(3)).unwrap();
        assert_eq!(next(&client).1.unwrap(), b"before");
        assert!(matches!(next(&client), (2, Err(IpcError::UnknownMessageType(MessageType(99))))));
        assert_eq!(next(&client).1.unwrap(), b"after");
        drop(connection);
        assert_eq!(server.stop().calls[1], 9);
    }
}

/// Goal:   a panic costs the call that caused it and nothing else, however often (F43).
/// Method: 100 panics on one connection, with good calls of the same, another connection and another
///         session between them; nothing leaks: all slots can still be used at once.
#[test]
fn r3_2_f43_a_panic_is_answered_and_everybody_goes_on() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let (one, two) = (client(server.path(), policy), client(server.path(), WaitPolicy::Block));
        let (a, b, c) = (one.open().unwrap(), one.open().unwrap(), two.open().unwrap());
        for round in 0..100u32 {
            let error = a.call(PANIC, b"please").unwrap_err();
            assert!(matches!(error, IpcError::HandlerPanic), "{error}");
            for connection in [&a, &b, &c] {
                let body = round.to_le_bytes();
                assert_eq!(connection.call(MessageType::ECHO, &body).unwrap(), body);
            }
        }
        for tag in 0..6 {
            a.submit(PANIC, b"all slots", &tagged(tag)).unwrap();
        }
        for tag in 0..6 {
            assert!(matches!(next(&one), (t, Err(IpcError::HandlerPanic)) if t == tag));
        }
        assert_eq!(stat(&c, "calls_handler_panic"), 106);
        assert_eq!(stat(&c, "sessions_ended"), 0);
    }
}

/// Goal:   an answer longer than its slot comes whole, whatever was lent for it, and is never cut short; one that is
///         longer than messages may be is refused by that limit.
/// Method: a handler that answers with 2 MiB, with every capacity there is; a caller whose own memory is too short.
#[test]
fn r1_5_an_answer_longer_than_its_slot_comes_whole() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for (request, reply_capacity) in
            [(0, 0), (1024, 0), (0, 1025), (0, 4096), (5000, 0), (0, 16384), (0, 2 << 20)]
        {
            for idempotent in [false, true] {
                let options = CallOptions { reply_capacity, idempotent, ..PLAIN };
                let answer = connection.call_with(FLOOD, &vec![1; request], &options, |a| a.to_vec());
                let answer = answer.and_then(|answer| answer).unwrap();
                assert!(answer.len() == 2 << 20 && answer.iter().all(|byte| *byte == 7));
            }
        }
        assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
        // A target shorter than the answer is the caller's own limit.
        let answer = connection.call_into(MessageType::ECHO, b"12345", &mut [0; 4], &PLAIN);
        assert!(matches!(answer, Err(IpcError::ReplyTooLarge(4))), "{answer:?}");
        let answer = connection.call_into(FLOOD, b"", &mut [0; 5000], &PLAIN);
        assert!(matches!(answer, Err(IpcError::ReplyTooLarge(5000))), "{answer:?}");

        let limited =
            ServerConfig { policy, reactors: 1, max_message_size: 1 << 20, ..ServerConfig::default() };
        let limited = TestServer::start_with(limited);
        let client = common::client(limited.path(), policy);
        let connection = client.open().unwrap();
        let answer = connection.call(FLOOD, b"");
        assert!(matches!(answer, Err(IpcError::MessageTooLarge(n)) if n == 1 << 20), "{answer:?}");
        assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
    }
}

/// Goal:   a handler's refusal reaches the caller with its text; the connection goes on (trap 18).
/// Method: refusals of several lengths of request, a good call after each.
#[test]
fn s9_a_refusal_comes_with_its_text() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for len in [1, 5, 1024, 16384] {
            let refused = connection.call(REFUSE, &vec![9; len]).unwrap_err();
            let text = format!("{len} bytes make no sense");
            assert!(matches!(&refused, IpcError::Decode(why) if *why == text), "{refused}");
            assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
        }
    }
}

/// Goal:   one byte above the limit is refused and names it, one byte less goes through; nothing else that
///         is under way is lost.
/// Method: with calls in flight before and after, blocking and pipelined, for a default and a small client.
#[test]
fn r1_5_a_message_above_the_limit_is_refused_and_nothing_else_is_lost() {
    for policy in ALL {
        let limit = 20_000;
        let config =
            ServerConfig { policy, reactors: 1, max_message_size: 20_000, ..ServerConfig::default() };
        let server = TestServer::start_with(config);
        for config in [ClientConfig::default(), ClientConfig::smallest()] {
            let client = IpcClient::connect_with(server.path(), &ClientConfig { policy, ..config }).unwrap();
            assert_eq!(client.max_message_size(), limit);
            let connection = client.open().unwrap();
            connection.submit(MessageType::ECHO, b"before", &tagged(1)).unwrap();
            let refused = connection.submit(MessageType::ECHO, &vec![1; limit + 1], &tagged(2));
            assert!(matches!(refused, Err(IpcError::MessageTooLarge(n)) if n == limit), "{refused:?}");
            let refused = connection.call(MessageType::ECHO, &vec![1; 10 << 20]);
            assert!(matches!(refused, Err(IpcError::MessageTooLarge(n)) if n == limit), "{refused:?}");
            connection.submit(MessageType::ECHO, &vec![3; limit], &tagged(3)).unwrap();
            assert_eq!(next(&client).1.unwrap(), b"before");
            let (tag, answer) = next(&client);
            assert!((tag, answer.unwrap()) == (3, vec![3; limit]));
            // More written than announced.
            let refused = connection.submit_with(MessageType::ECHO, limit, &PLAIN, |slot| {
                slot.write(&vec![1; limit])?;
                assert_eq!(slot.remaining(), 0);
                slot.write(&[1])
            });
            assert!(matches!(refused, Err(IpcError::MessageTooLarge(n)) if n == limit), "{refused:?}");
            assert_eq!(connection.call(MessageType::ECHO, &vec![4; limit]).unwrap(), vec![4; limit]);
        }
    }
}

/// Goal:   when all slots are out the pipelined caller is told, nothing is sent and nothing is lost; calls
///         of a connection start in their order.
/// Method: the reactor is held while slots are used up; counters tell the order in which calls started;
///         tags tell whose answer is whose. Several rounds, so that slots are used again.
#[test]
fn r1_9_would_block_when_the_slots_are_out_and_nothing_is_lost() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for round in 0..10 {
            let first = counted(server.state);
            hold(&server, &connection, 100);
            let mut tags = vec![100];
            let full = loop {
                match connection.submit(COUNT, b"12345678", &tagged(tags.len() as u64)) {
                    Ok(_) => tags.push(tags.len() as u64),
                    Err(error) => break error,
                }
            };
            assert!(matches!(full, IpcError::WouldBlock), "{full}");
            assert_eq!((tags.len(), client.in_flight()), (6, 6), "4 small slots, 1 medium, 1 large");
            server.open_gate();
            for (n, tag) in tags.iter().enumerate() {
                let (answered, answer) = next(&client);
                assert_eq!((answered, number(&answer.unwrap())), (*tag, first + n as u64 + 1), "{round}");
            }
            assert!(client.poll().unwrap().is_none());
            assert_eq!(client.in_flight(), 0);
        }
    }
}

/// Goal:   the same when the ring is full before the slots are: entries wait, none is dropped (trap 5).
/// Method: 8 entries and 64 slots, the reactor held; then answers are left in the ring for as long as
///         anything can be submitted, so that the completion ring fills, too.
#[test]
fn r1_9_trap5_would_block_when_the_ring_is_full_and_nothing_is_lost() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let config = ClientConfig { ring_entries: 8, small_slots: 64, policy, ..ClientConfig::default() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        hold(&server, &connection, 0);
        let mut sent = 1;
        while connection.submit(COUNT, b"", &tagged(sent)).is_ok() {
            sent += 1;
        }
        assert!((8..=9).contains(&sent), "{sent} calls in a ring of 8");
        server.open_gate();
        // The answers are not taken: 7 calls are admitted, then the ring behind them fills.
        let full = eventually_full(&client, &connection, &mut sent);
        assert!(matches!(full, IpcError::WouldBlock), "{full}");
        for tag in 0..sent {
            let (answered, answer) = next(&client);
            assert_eq!((answered, number(&answer.unwrap())), (tag, tag + 1));
        }
        assert_eq!((client.in_flight(), counted(server.state)), (0, sent));
    }
}

/// Submits until both rings are full: 7 answers not taken, 8 entries behind them.
fn eventually_full(client: &IpcClient, connection: &Connection<'_>, sent: &mut u64) -> IpcError {
    let mut refused = IpcError::WouldBlock;
    eventually("both rings are full", || {
        match connection.submit(COUNT, b"", &tagged(*sent)) {
            Ok(_) => *sent += 1,
            Err(error) => refused = error,
        }
        client.flush().unwrap();
        *sent == 15
    });
    // A sixteenth cannot go in, however long one tries.
    for _ in 0..1000 {
        refused = connection.submit(COUNT, b"", &tagged(99)).unwrap_err();
    }
    refused
}

/// Goal:   a blocking call waits when there is no room, and neither it nor what filled the room is lost.
/// Method: a gate holds the reactor until the caller has been seen without room. First the ring is full;
///         then every slot belongs to a call that was given up and has not ended.
#[test]
fn r1_9_a_blocking_call_waits_for_room() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let config = ClientConfig { ring_entries: 8, small_slots: 64, policy, ..ClientConfig::default() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        hold(&server, &connection, 0);
        let mut sent = 1;
        while connection.submit(COUNT, b"", &tagged(sent)).is_ok() {
            sent += 1;
        }
        std::thread::scope(|scope| {
            scope.spawn(|| server.open_gate());
            assert_eq!(number(&connection.call(COUNT, b"").unwrap()), sent + 1);
        });
        for tag in 0..sent {
            let (answered, answer) = next(&client);
            assert_eq!((answered, number(&answer.unwrap())), (tag, tag + 1));
        }

        let small = ClientConfig { policy, ..ClientConfig::smallest() };
        let small = IpcClient::connect_with(server.path(), &small).unwrap();
        let given_up = small.open().unwrap();
        hold(&server, &connection, 0);
        let short = CallOptions { timeout: Some(Duration::from_millis(1)), ..PLAIN };
        for _ in 0..4 {
            let answer = given_up.call_with(COUNT, b"", &short, |_| ());
            assert!(matches!(answer, Err(IpcError::Timeout)), "{answer:?}");
        }
        let full = given_up.submit(COUNT, b"", &PLAIN);
        assert!(matches!(full, Err(IpcError::WouldBlock)), "{full:?}");
        std::thread::scope(|scope| {
            scope.spawn(|| server.open_gate());
            // The gate's call ran, the four were cancelled by giving them up.
            assert_eq!(number(&given_up.call(COUNT, b"").unwrap()), sent + 3);
        });
        assert!(small.poll().unwrap().is_none() && small.in_flight() == 0);
    }
}

/// Goal:   who waits for room while all of it is held by answers that nobody has taken is told so, for it
///         would wait for ever.
/// Method: six answers left untaken, then a blocking call; they are all still there.
#[test]
fn r1_9_a_blocking_call_that_only_the_caller_could_make_room_for_is_told_so() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for tag in 0..6 {
            connection.submit(COUNT, b"", &tagged(tag)).unwrap();
        }
        client.flush().unwrap();
        eventually("all have run", || counted(server.state) == 6);
        let full = connection.call(COUNT, b"");
        assert!(matches!(full, Err(IpcError::WouldBlock)), "{full:?}");
        for tag in 0..6 {
            assert_eq!(next(&client).0, tag);
        }
        assert_eq!(number(&connection.call(COUNT, b"").unwrap()), 7);
    }
}

/// Goal:   a blocking call takes its own answer and leaves the others' to those who poll.
/// Method: calls submitted before it, which are answered first.
#[test]
fn trap15_a_blocking_call_leaves_other_answers_alone() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let (a, b) = (client.open().unwrap(), client.open().unwrap());
        for round in 0..20u64 {
            a.submit(MessageType::ECHO, b"first", &tagged(round)).unwrap();
            b.submit(MessageType::ECHO, b"second", &tagged(round + 100)).unwrap();
            assert_eq!(a.call(MessageType::ECHO, b"mine").unwrap(), b"mine");
            assert_eq!(next(&client).1.unwrap(), b"first");
            let (tag, answer) = next(&client);
            assert_eq!((tag, answer.unwrap()), (round + 100, b"second".to_vec()));
        }
    }
}

/// Goal:   an idempotent call's request and answer lie in slots of their own; both are free afterwards.
/// Method: many in a row and several at once, of every class; then all six slots are used at once.
#[test]
fn r3_4_an_idempotent_call_uses_two_slots_and_gives_both_back() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for round in 0..50usize {
            let body = vec![round as u8; [10, 1024, 3000][round % 3]];
            let options = CallOptions { idempotent: true, reply_capacity: body.len(), ..PLAIN };
            let answer =
                connection.call_with(MessageType::ECHO, &body, &options, |a| a.to_vec()).and_then(|a| a);
            assert_eq!(answer.unwrap(), body);
        }
        let options = CallOptions { idempotent: true, ..PLAIN };
        for tag in 0..3 {
            connection.submit(COUNT, b"", &CallOptions { tag, ..options }).unwrap();
        }
        let fourth = connection.submit(COUNT, b"", &options);
        assert!(matches!(fourth, Err(IpcError::WouldBlock)), "three calls hold six slots");
        for tag in 0..3 {
            assert_eq!(next(&client).0, tag);
        }
        for tag in 0..6 {
            connection.submit(COUNT, b"", &tagged(tag)).unwrap();
        }
        for tag in 0..6 {
            assert_eq!(next(&client).0, tag);
        }
    }
}

/// Goal:   R3.4, R1.9: an idempotent call comes through whatever slots a session has: where there are no two that its request and
///         its answer fit, it goes in frames; afterwards all slots are free.
/// Method: sessions with one slot of their largest class, requests and room for answers around the edges of each class; then as
///         many calls at once as there are slots.
#[test]
fn r3_4_r1_9_an_idempotent_call_needs_no_second_slot_of_its_class() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let large = ClientConfig { medium_slots: 1, ..ClientConfig::for_load(1, 16384) };
        for (config, slots) in [(ClientConfig::for_load(1, 4096), 5), (large, 6)] {
            let client = IpcClient::connect_with(server.path(), &ClientConfig { policy, ..config }).unwrap();
            let connection = client.open().unwrap();
            for (len, room) in [
                (0, 4096),
                (1024, 1024),
                (1024, 4096),
                (1025, 1025),
                (1025, 4096),
                (4096, 4096),
                (4096, 16384),
                (4097, 4097),
                (16384, 16384),
                (16384, 16385),
            ] {
                let request = vec![len as u8; len];
                let mut answer = vec![0; room];
                let options = CallOptions { idempotent: true, ..PLAIN };
                let called = connection.call_into(MessageType::ECHO, &request, &mut answer, &options);
                assert_eq!(called.unwrap(), len, "{len} bytes, room for {room}");
                assert!(answer[..len] == request, "{len} bytes, room for {room}");
            }
            for tag in 0..slots {
                connection.submit(COUNT, b"", &tagged(tag)).unwrap();
            }
            for tag in 0..slots {
                assert_eq!(next(&client).0, tag);
            }
        }
    }
}

/// Goal:   R1.9, R3.1: what no waiting could make possible is refused with what to configure; what is possible is done.
/// Method: sessions of one slot and of two: plain calls, idempotent ones and streams, longer and shorter than a slot.
#[test]
fn r1_9_r3_1_a_session_of_too_few_slots_says_so() {
    let server = TestServer::start(WaitPolicy::Block);
    let pieces = CallOptions { pieces: true, ..PLAIN };
    let idempotent = CallOptions { idempotent: true, ..PLAIN };
    for slots in [1, 2] {
        let config = ClientConfig {
            policy: WaitPolicy::Block,
            small_slots: 0,
            medium_slots: slots,
            ..ClientConfig::smallest()
        };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        let tried = |len: usize, options: &CallOptions| {
            let reply_capacity = len;
            let options = CallOptions { reply_capacity, ..*options };
            let id = connection.submit(MessageType::ECHO, &vec![7; len], &options)?;
            assert!(client.wait(None).unwrap());
            let answer = client.poll().unwrap().expect("waited for");
            assert!(answer.is_last() && answer.to_vec().unwrap() == vec![7; len], "{id:?}");
            Ok(())
        };
        let is_done = |result: Result<(), IpcError>| match result {
            Ok(()) => true,
            Err(IpcError::Config(what)) if what.contains("small_slots") => false,
            Err(error) => panic!("{error}"),
        };
        for len in [0, 4096] {
            assert!(is_done(tried(len, &PLAIN)), "{len} bytes");
            assert_eq!(is_done(tried(len, &idempotent)), slots == 2, "{len} bytes in {slots}");
            assert_eq!(is_done(tried(len, &pieces)), slots == 2, "{len} bytes in {slots}");
        }
        for options in [PLAIN, idempotent, pieces, CallOptions { idempotent: true, ..pieces }] {
            assert!(!is_done(tried(4097, &options)), "{options:?} in {slots}");
        }
        assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
    }
}

/// Goal:   a call whose deadline has passed before it could start is not run, and says so; one whose
///         deadline has not is run.
/// Method: the reactor is held until the deadline is over; the counter tells what ran.
#[test]
fn r2_9_a_call_past_its_deadline_is_not_run() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        hold(&server, &connection, 0);
        let begun = Instant::now();
        let within = |deadline| CallOptions { tag: 1, deadline: Some(deadline), ..PLAIN };
        connection.submit(COUNT, b"", &within(Duration::from_millis(1))).unwrap();
        connection.submit(COUNT, b"", &within(Duration::from_secs(3600))).unwrap();
        eventually("the deadline is over", || begun.elapsed() > Duration::from_millis(2));
        server.open_gate();
        assert_eq!(number(&next(&client).1.unwrap()), 1);
        assert!(matches!(next(&client).1, Err(IpcError::DeadlineExceeded)));
        assert_eq!(number(&next(&client).1.unwrap()), 2, "the late one did not run, the other did");
        let late = connection.call_with(COUNT, b"", &within(Duration::ZERO), |_| ());
        assert!(matches!(late, Err(IpcError::DeadlineExceeded)), "{late:?}");
        assert_eq!(counted(server.state), 2);
    }
}

/// Goal:   the two sides agree on the clock however long the handshake took: a deadline does not grow by it.
/// Method: a client connects while the reactor is held for 30 ms; then a call of its with a deadline of 1 ms
///         waits for 5.
#[test]
fn r2_9_s11_a_slow_handshake_does_not_move_deadlines() {
    let server = TestServer::start(WaitPolicy::Block);
    let holder = client(server.path(), WaitPolicy::Block);
    let gate = holder.open().unwrap();
    hold(&server, &gate, 0);
    let begun = Instant::now();
    let path = server.path().to_owned();
    let connecting = std::thread::spawn(move || client(&path, WaitPolicy::Block));
    eventually("30 ms are over", || begun.elapsed() > Duration::from_millis(30));
    server.open_gate();
    next(&holder).1.unwrap();
    let late = connecting.join().unwrap();
    let connection = late.open().unwrap();
    hold(&server, &gate, 0);
    let begun = Instant::now();
    let options = CallOptions { deadline: Some(Duration::from_millis(1)), ..PLAIN };
    connection.submit(COUNT, b"", &options).unwrap();
    late.flush().unwrap();
    eventually("the deadline is over", || begun.elapsed() > Duration::from_millis(5));
    server.open_gate();
    let answer = next(&late).1;
    assert!(matches!(answer, Err(IpcError::DeadlineExceeded)), "{answer:?}");
}

/// Goal:   durations beyond all clocks mean no limit; they neither wrap round to a short one nor panic.
/// Method: the largest duration, and one that is 1 ns once its nanoseconds are cut to 64 bits.
#[test]
fn r2_9_a_deadline_or_time_out_beyond_all_clocks_is_none() {
    let server = TestServer::start(WaitPolicy::Block);
    let wraps = Duration::new(18_446_744_073, 709_551_617);
    for long in [Duration::MAX, wraps] {
        let config = ClientConfig { connect_timeout: long, ..ClientConfig::default() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        for options in
            [CallOptions { deadline: Some(long), ..PLAIN }, CallOptions { timeout: Some(long), ..PLAIN }]
        {
            let answer = connection.call_with(COUNT, b"", &options, |_| ());
            assert!(answer.is_ok(), "{options:?}: {answer:?}");
        }
        connection.submit(COUNT, b"", &PLAIN).unwrap();
        assert!(client.wait(Some(long)).unwrap());
    }
}

/// Goal:   a call that is cancelled before it starts is not run and answered `Cancelled`, exactly once;
///         calls before and behind it are untouched (trap 19).
/// Method: the reactor is held; the second of three queued calls is cancelled, twice.
#[test]
fn r2_6_a_call_cancelled_before_it_starts_is_not_run_and_answered_once() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for round in 0..20 {
            let before = counted(server.state);
            hold(&server, &connection, 0);
            connection.submit(COUNT, b"", &tagged(1)).unwrap();
            let unwanted = connection.submit(COUNT, b"", &tagged(2)).unwrap();
            connection.submit(COUNT, b"", &tagged(3)).unwrap();
            client.cancel(unwanted);
            client.cancel(unwanted);
            client.flush().unwrap();
            server.open_gate();
            for (tag, count) in [(0, Some(1)), (1, Some(2)), (2, None), (3, Some(3))] {
                let (answered, answer) = next(&client);
                assert_eq!(answered, tag);
                match count {
                    Some(count) => assert_eq!(number(&answer.unwrap()), before + count, "{round}"),
                    None => assert!(matches!(answer, Err(IpcError::Cancelled)), "{round}: {answer:?}"),
                }
            }
            assert!(client.poll().unwrap().is_none() && client.in_flight() == 0);
        }
    }
}

/// Goal:   the same for calls that the server has copied out of the ring already, in one batch with one that
///         runs: they have not started.
/// Method: a gated call and others published together; while the first holds the reactor, each of the
///         others in turn is cancelled.
#[test]
fn r2_6_a_call_cancelled_behind_a_running_one_of_the_same_batch_is_not_run() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for unwanted in 1..=3u64 {
            let (before, entered) = (counted(server.state), server.entered());
            let mut ids = vec![connection.submit(GATE, b"", &tagged(0)).unwrap()];
            for tag in 1..=3 {
                ids.push(connection.submit(COUNT, b"", &tagged(tag)).unwrap());
            }
            client.flush().unwrap();
            eventually("the gate holds the reactor", || server.entered() == entered + 1);
            client.cancel(ids[unwanted as usize]);
            client.flush().unwrap();
            server.open_gate();
            for tag in 0..=3 {
                let (answered, answer) = next(&client);
                assert_eq!(answered, tag);
                let cancelled = matches!(answer, Err(IpcError::Cancelled));
                assert_eq!(cancelled, tag == unwanted, "call {tag}: {answer:?}");
            }
            assert_eq!(counted(server.state), before + 3);
        }
    }
}

/// Goal:   a cancel that comes too late hits nothing: not its own call, which has its result, and never
///         the next one in the same slot (trap 19).
/// Method: cancels of a call that runs, of one that has run and not been taken, of one that is over; after
///         each the same slot carries another call.
#[test]
fn r2_6_trap19_a_late_cancel_hits_no_other_call() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let config = ClientConfig { policy, ..ClientConfig::smallest() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        for _ in 0..20 {
            let before = server.entered();
            let running = connection.submit(GATE, b"", &PLAIN).unwrap();
            client.flush().unwrap();
            eventually("it runs", || server.entered() == before + 1);
            client.cancel(running);
            client.flush().unwrap();
            server.open_gate();
            next(&client).1.expect("it ran, so it has its result");

            let answered = connection.submit(COUNT, b"", &PLAIN).unwrap();
            assert!(client.wait(None).unwrap());
            client.cancel(answered);
            client.flush().unwrap();
            next(&client).1.expect("it had its result before the cancel");

            let over = connection.submit(COUNT, b"", &PLAIN).unwrap();
            next(&client).1.unwrap();
            client.cancel(over);
            for tag in 0..4 {
                let id = connection.submit(COUNT, b"", &tagged(tag)).unwrap();
                assert!(![running, answered, over].contains(&id), "an id was used again");
                client.cancel(over);
            }
            for tag in 0..4 {
                let (t, answer) = next(&client);
                assert_eq!(t, tag);
                answer.expect("cancelled by another call's cancel");
            }
        }
    }
}

/// Goal:   a call that is given up locally never hands its answer to another: its slot stays lent until
///         the late answer has come, which nobody sees (F58).
/// Method: the reactor is held while a running and a queued call time out; every later call gets its own
///         answer; at the end all slots can be used.
#[test]
fn f58_trap15_a_late_answer_after_a_local_time_out_meets_no_other_call() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        let short = CallOptions { timeout: Some(Duration::from_millis(1)), ..PLAIN };
        let mut cancelled = 10;
        for round in 0..10u64 {
            let entered = server.entered();
            // One that is given up before it starts is cancelled; this is about one that has started.
            let runs = || {
                eventually("it has ended, or it runs", || {
                    assert!(client.poll().unwrap().is_none(), "an answer that nobody waits for surfaced");
                    client.in_flight() == 0 || server.entered() == entered + 1
                });
                server.entered() == entered + 1
            };
            let mut timeout = Duration::from_millis(1);
            loop {
                let options = CallOptions { timeout: Some(timeout), ..PLAIN };
                let given_up = connection.call_with(GATE, b"late", &options, |_| ());
                assert!(matches!(given_up, Err(IpcError::Timeout)), "{given_up:?}");
                if runs() {
                    break;
                }
                timeout *= 2;
                cancelled += 1;
            }
            let queued = connection.call_with(MessageType::ECHO, b"never", &short, |_| ());
            assert!(matches!(queued, Err(IpcError::Timeout)), "{queued:?}");
            assert_eq!(client.in_flight(), 2, "both slots are still lent");
            let mut free = 0;
            while connection.submit(MessageType::ECHO, &[free], &tagged(free.into())).is_ok() {
                free += 1;
            }
            assert_eq!(free, 4, "the two slots given up cannot be had yet");
            server.open_gate();
            for tag in 0..4u8 {
                let (answered, answer) = next(&client);
                assert_eq!((answered, answer.unwrap()), (tag.into(), vec![tag]), "{round}");
            }
            let own = round.to_le_bytes();
            assert_eq!(connection.call(MessageType::ECHO, &own).unwrap(), own);
            assert!(client.poll().unwrap().is_none(), "a late answer surfaced");
            assert_eq!(client.in_flight(), 0, "the slots given up are free again");
        }
        // The queued ones were cancelled by giving them up, and not run.
        assert_eq!(stat(&connection, "calls_cancelled"), cancelled);
    }
}

/// Goal:   the limit on connections is named when it is reached, those open go on, and a place that is
///         given back can be had again (F29).
/// Method: a limit of three over two clients; open, refuse, close, open again, many times.
#[test]
fn r1_8_f29_the_limit_on_connections_is_named_and_others_go_on() {
    for policy in ALL {
        let server = TestServer::start_with(ServerConfig {
            max_connections: 3,
            policy,
            reactors: 1,
            ..Default::default()
        });
        let (one, two) = (client(server.path(), policy), client(server.path(), policy));
        let (own, other) = (one.open().unwrap(), two.open().unwrap());
        for _ in 0..50 {
            let third = one.open().unwrap();
            for client in [&one, &two] {
                let refused = client.open().map(|c| c.number());
                assert!(
                    matches!(refused, Err(IpcError::TooMany { scope: "connections", limit: 3, .. })),
                    "{refused:?}"
                );
            }
            for connection in [&own, &other, &third] {
                assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
            }
        }
        assert_eq!(stat(&own, "connections_refused"), 100);
        own.detach();
        drop(one);
        // A client that goes gives back all that it had open, as soon as the server knows.
        let mut more = vec![other];
        eventually("the other's connections can be had", || {
            more.extend(two.open().ok());
            more.len() == 3
        });
    }
}

/// Goal:   a bulk connection's place can be had again at once, too, although its CLOSE travels in the bulk
///         ring and the next OPEN in the interactive one.
/// Method: a limit of one; open bulk, call, drop, open again.
#[test]
fn r1_8_a_closed_bulk_connection_makes_room_for_the_next() {
    for policy in ALL {
        let server = TestServer::start_with(ServerConfig {
            max_connections: 1,
            policy,
            reactors: 1,
            ..Default::default()
        });
        let client = client(server.path(), policy);
        for round in 0..20 {
            let bulk = round % 2 == 0;
            let connection = client.open_with(0, bulk).unwrap_or_else(|e| panic!("round {round}: {e}"));
            assert_eq!(connection.call(MessageType::ECHO, b"bulk").unwrap(), b"bulk");
        }
    }
}

/// Goal:   the limit on sessions is named when it is reached, and a session that ends makes room (F29).
/// Method: a limit of two; the third is refused while both go on, and comes in once one has gone.
#[test]
fn r1_8_f29_the_limit_on_sessions_is_named_and_others_go_on() {
    for policy in ALL {
        let config =
            ServerConfig { max_sessions: 2, max_half_open: 2, policy, reactors: 1, ..Default::default() };
        let server = TestServer::start_with(config);
        let (one, two) = (client(server.path(), policy), client(server.path(), policy));
        for _ in 0..20 {
            let refused = IpcClient::connect(server.path());
            assert!(
                matches!(refused, Err(IpcError::TooMany { scope: "sessions", limit: 2, .. })),
                "{refused:?}"
            );
        }
        for client in [&one, &two] {
            assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"on").unwrap(), b"on");
        }
        drop(one);
        eventually("the place can be had", || IpcClient::connect(server.path()).is_ok());
        let connection = two.open().unwrap();
        assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
        assert!(stat(&connection, "sessions_refused") >= 20);
    }
}

/// Goal:   a thousand connections of one client are a thousand conversations.
/// Method: all opened, a call on each at once as far as slots go, answers matched; one more is refused.
#[test]
fn r1_8_a_thousand_connections_of_one_client_are_all_answered() {
    let server = TestServer::start(WaitPolicy::Block);
    let config = ClientConfig::for_load(64, 64);
    let client = IpcClient::connect_with(server.path(), &config).unwrap();
    let connections: Vec<_> = (0..1000).map(|_| client.open().unwrap()).collect();
    let refused = client.open().map(|c| c.number());
    assert!(matches!(refused, Err(IpcError::TooMany { limit: 1000, .. })), "{refused:?}");
    let mut answered = vec![false; 1000];
    let mut take = |client: &IpcClient| {
        let (tag, answer) = next(client);
        assert_eq!(answer.unwrap(), tag.to_le_bytes());
        assert!(!std::mem::replace(&mut answered[tag as usize], true), "{tag} was answered twice");
    };
    for (tag, connection) in (0u64..).zip(&connections) {
        while let Err(error) = connection.submit(MessageType::ECHO, &tag.to_le_bytes(), &tagged(tag)) {
            assert!(matches!(error, IpcError::WouldBlock), "{error}");
            take(&client);
        }
    }
    while client.in_flight() > 0 {
        take(&client);
    }
    assert!(answered.iter().all(|a| *a));
    assert_eq!(stat(&connections[0], "connections_open"), 1000);
    drop(connections);
    let last = client.open().unwrap();
    eventually("all others are closed", || stat(&last, "connections_open") == 1);
}

/// Goal:   many sessions at once are all served, each with its own answers.
/// Method: 50 threads with a client each, all connected at the same time, a hundred calls each.
#[test]
fn r1_8_fifty_sessions_of_as_many_threads_are_all_answered() {
    let server = TestServer::start(WaitPolicy::Block);
    let all_connected = std::sync::Barrier::new(50);
    std::thread::scope(|scope| {
        for thread in 0..50u64 {
            let (path, barrier) = (server.path(), &all_connected);
            scope.spawn(move || {
                // Of the usual size: the default budget has room for a hundred of them.
                let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::default() };
                let client = IpcClient::connect_with(path, &config).unwrap();
                let connection = client.open().unwrap();
                barrier.wait();
                for call in 0..100u64 {
                    let body = [thread.to_le_bytes(), call.to_le_bytes()].concat();
                    assert_eq!(connection.call(MessageType::ECHO, &body).unwrap(), body);
                }
                barrier.wait();
            });
        }
    });
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    eventually("the sessions have ended", || stat(&connection, "sessions_ended") == 50);
    assert_eq!(stat(&connection, "connections_open"), 1);
}

/// Goal:   calls on a bulk connection work like any other.
/// Method: blocking and pipelined, of every size, mixed with interactive ones.
#[test]
fn r2_8_calls_on_a_bulk_connection_are_answered() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let bulk = client.open_with(0, true).unwrap();
        let interactive = client.open().unwrap();
        for len in [0, 100, 1025, 16384] {
            let body = vec![len as u8; len];
            assert_eq!(bulk.call(MessageType::ECHO, &body).unwrap(), body);
            assert_eq!(interactive.call(MessageType::ECHO, &body).unwrap(), body);
        }
        for tag in 0..40 {
            let connection = if tag % 2 == 0 { &bulk } else { &interactive };
            connection.submit(MessageType::ECHO, &[tag], &tagged(tag.into())).unwrap();
            if tag % 4 == 3 {
                let mut answers: Vec<u64> = (0..4).map(|_| next(&client).0).collect();
                answers.sort_unstable();
                assert_eq!(answers, (u64::from(tag) - 3..=u64::from(tag)).collect::<Vec<_>>());
            }
        }
        assert!(matches!(bulk.call(PANIC, b""), Err(IpcError::HandlerPanic)));
    }
}

/// Goal:   interactive calls overtake bulk ones that are queued, and bulk ones among themselves keep
///         their order.
/// Method: the reactor is held by a call of either priority while five bulk calls and then an interactive
///         one are queued; the counter tells who ran when.
#[test]
fn r2_8_an_interactive_call_overtakes_queued_bulk_ones() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let config = ClientConfig { small_slots: 8, policy, ..ClientConfig::default() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let bulk = client.open_with(0, true).unwrap();
        let interactive = client.open().unwrap();
        for holder in [&interactive, &bulk] {
            let before = counted(server.state);
            hold(&server, holder, 0);
            for tag in 1..=5 {
                bulk.submit(COUNT, b"", &tagged(tag)).unwrap();
            }
            interactive.submit(COUNT, b"", &tagged(6)).unwrap();
            client.flush().unwrap();
            server.open_gate();
            let mut counts = [0; 7];
            for _ in 0..7 {
                let (tag, answer) = next(&client);
                counts[tag as usize] = number(&answer.unwrap()) - before;
            }
            assert_eq!(counts, [1, 3, 4, 5, 6, 7, 2], "tags 1 to 5 are bulk, 6 is interactive");
        }
    }
}

/// Goal:   bulk keeps a share: interactive calls that never end do not starve it (R2.8, DESIGN §3).
/// Method: an interactive client always has calls queued; a bulk call is answered all the same.
#[test]
fn r2_8_bulk_calls_are_answered_while_interactive_ones_go_on() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let busy = IpcClient::connect_with(server.path(), &ClientConfig::for_load(64, 64)).unwrap();
        let interactive = busy.open().unwrap();
        let bulk = busy.open_with(0, true).unwrap();
        bulk.submit(COUNT, b"", &tagged(1)).unwrap();
        let mut answered = false;
        while !answered {
            while interactive.submit(MessageType::PING, b"", &tagged(0)).is_ok() {}
            answered = next(&busy).0 == 1;
        }
    }
}

/// Goal:   connections close when dropped, even when there is no slot for the CLOSE at that moment.
/// Method: all slots used up behind a gate, connections dropped meanwhile; later all are closed.
#[test]
fn r1_8_a_connection_dropped_without_a_free_slot_is_closed_later() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let last = client.open().unwrap();
        let dropped: Vec<_> = (0..10).map(|_| client.open().unwrap()).collect();
        hold(&server, &last, 0);
        while last.submit(COUNT, b"", &PLAIN).is_ok() {}
        drop(dropped);
        server.open_gate();
        for _ in 0..6 {
            next(&client).1.unwrap();
        }
        eventually("all others are closed", || stat(&last, "connections_open") == 1);
    }
}

/// Goal:   a client moves between threads and works on each.
/// Method: the same client and connection id handed from thread to thread.
#[test]
fn trap7_a_client_moves_between_threads() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut client = client(server.path(), WaitPolicy::Block);
    let id = client.open().unwrap().detach();
    for round in 0..10u8 {
        let moved = std::thread::spawn(move || {
            assert_eq!(client.attached(id).call(MessageType::ECHO, &[round]).unwrap(), [round]);
            client
        });
        client = moved.join().unwrap();
    }
}

/// Goal:   an answer taken into the caller's memory is the answer, cut to that memory and told in full length;
///         its slot is free at once.
/// Method: answers of several lengths into a short and a long buffer; more of them than there are slots.
#[test]
fn r1_7_an_answer_is_taken_into_memory_of_the_callers() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let config = ClientConfig { policy, ..ClientConfig::smallest() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        for round in 0..40u64 {
            let body = vec![round as u8; 25 * round as usize];
            connection.submit(MessageType::ECHO, &body, &tagged(round)).unwrap();
            assert!(client.wait(None).unwrap());
            let mut target = [0xee; 500];
            let taken = client.poll_into(&mut target).unwrap().unwrap();
            assert_eq!((taken.tag, taken.len, taken.status), (round, body.len(), Some(doorbell::Status::Ok)));
            let copied = body.len().min(500);
            assert!(target[..copied] == body[..copied] && target[copied..].iter().all(|b| *b == 0xee));
            assert_eq!(client.poll_into(&mut target).unwrap(), None);
        }
        connection.submit(MessageType(999), b"", &tagged(7)).unwrap();
        assert!(client.wait(None).unwrap());
        let taken = client.poll_into(&mut []).unwrap().unwrap();
        assert_eq!((taken.tag, taken.status), (7, Some(doorbell::Status::UnknownType)));
    }
}
