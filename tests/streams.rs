//! Answers read as streams by a client that blocks (R1.9, R2.6; traps 15, 17, 19).

mod common;

use common::streams::{ENDLESS, RECORDS, is_pattern, pattern, records_request};
use common::{COUNT, GATE, PANIC, TestServer, client, eventually};
use doorbell::protocol::records::RecordError;
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, WaitPolicy};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];

fn plain() -> CallOptions {
    CallOptions::default()
}

/// Goal:   every byte of an answer comes once, in order, and its end comes once, whatever its length.
/// Method: echoes of lengths at the edges of slots and frames, every policy; sessions with leases and without, and with
///         a lease at hand that would carry the request in one slot.
#[test]
fn r1_9_a_stream_hands_out_every_byte_and_one_end() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let base = ClientConfig { policy, ..ClientConfig::default() };
        for config in [base.clone(), ClientConfig { policy, ..ClientConfig::smallest() }] {
            let client = IpcClient::connect_with(server.path(), &config).unwrap();
            let connection = client.open().unwrap();
            for len in [0, 1, 1023, 1024, 1025, 4096, 4097, 16384, 16385, 70_000] {
                let request: Vec<u8> = (0..len).map(pattern).collect();
                let mut stream = connection.stream(MessageType::ECHO, &request, &plain()).unwrap();
                let mut at = 0;
                for frame in stream.by_ref() {
                    let frame = frame.unwrap();
                    assert!(!frame.is_empty() && is_pattern(&frame, at), "{len} bytes, at {at}, {policy:?}");
                    at += frame.len();
                }
                assert_eq!(at, len);
                assert!(stream.next().is_none() && stream.next_frame().is_none(), "one end");
            }
            assert_eq!(client.in_flight(), 0);
        }
    }
}

/// Goal:   R1.9, R5.3: a stream whose request fits a slot takes that slot and no more memory; the last free slot stays
///         for other calls.
/// Method: a session of four slots that leases nothing: three endless streams at once, each read in turn, and calls
///         beside them; a fourth stream finds no room until one of them is dropped.
#[test]
fn r1_9_r5_3_a_stream_takes_one_slot_and_never_the_last() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let config = ClientConfig { policy, ..ClientConfig::smallest() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        let open = || connection.stream(ENDLESS, b"short", &plain()).unwrap();
        let mut streams = [open(), open(), open()];
        let mut at = [0; 3];
        for _ in 0..50 {
            for (stream, at) in streams.iter_mut().zip(&mut at) {
                let frame = stream.next().unwrap().unwrap();
                assert!(is_pattern(&frame, *at), "{policy:?} at {at}");
                *at += frame.len();
            }
            assert_eq!(connection.call(MessageType::ECHO, b"beside them").unwrap(), b"beside them");
        }
        let pieces = CallOptions { pieces: true, ..plain() };
        let full = connection.submit(ENDLESS, b"short", &pieces);
        assert!(matches!(full, Err(IpcError::WouldBlock)), "{full:?}");
        let [first, ..] = streams;
        drop(first);
        assert!(is_pattern(&open().next().unwrap().unwrap(), 0));
    }
}

/// Goal:   pieces are handed out as pieces although a lease would carry the request in one slot.
/// Method: a call of 4 KiB leaves a lease behind; an endless answer to a short request would never come whole.
#[test]
fn r1_9_a_stream_is_one_although_its_request_fits_a_leased_slot() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    connection.call(MessageType::ECHO, &[1; 4096]).unwrap();
    let options = CallOptions { reply_capacity: 4096, ..plain() };
    let mut stream = connection.stream(ENDLESS, b"", &options).unwrap();
    assert!(is_pattern(&stream.next().unwrap().unwrap(), 0));
}

/// Goal:   R2.5: a streamed answer comes apart into its records, whatever frames cut them, and an answer that ends
///         within one is an error.
#[test]
fn r2_5_a_streamed_answer_comes_apart_into_its_records() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    for (count, len) in [(0, 0), (1, 0), (100, 64), (7, 5000), (2, 70_000)] {
        let request = records_request(count, len, false);
        let mut records = connection.stream(RECORDS, &request, &plain()).unwrap().records();
        let (mut got, mut record) = (0, Vec::new());
        while let Some(next) = records.next_into(&mut record) {
            next.unwrap();
            assert!(record.len() == len as usize && is_pattern(&record, 0));
            got += 1;
        }
        assert_eq!(got, count);
        assert!(records.next().is_none(), "one end");
    }
    let torn = connection.stream(RECORDS, &records_request(1, 10, true), &plain()).unwrap();
    let all: Vec<_> = torn.records().collect();
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].as_ref().unwrap().len(), 10);
    let cut = IpcError::Records(RecordError::Truncated { have: 5, missing: 99 });
    assert_eq!(all[1].as_ref().unwrap_err().to_string(), cut.to_string());
    // An echo of what is no record.
    let mut wrong = connection.stream(MessageType::ECHO, &[0xFF; 9000], &plain()).unwrap().records();
    assert!(matches!(wrong.next(), Some(Err(IpcError::Records(RecordError::TooLong { .. })))));
    assert!(wrong.next().is_none());
    drop(wrong);
    assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
    eventually("the call has ended", || client.poll().unwrap().is_none() && client.in_flight() == 0);
}

/// Goal:   R2.6, trap 19: a dropped stream ends its call at the server, at every moment, and no call behind it is met
///         by it.
/// Method: dropped at once, after a frame, after some, with a frame kept, after the end, and cancelled by name; each
///         followed by calls whose answers are checked, until the server has no stream left.
#[test]
fn r2_6_trap19_a_dropped_stream_is_cancelled_at_every_moment() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        for frames in [0, 1, 2, 9] {
            let mut stream = connection.stream(ENDLESS, &[0; 20], &plain()).unwrap();
            let mut at = 0;
            for _ in 0..frames {
                let frame = stream.next().unwrap().unwrap();
                assert!(is_pattern(&frame, at));
                at += frame.len();
            }
            drop(stream);
            assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
            eventually("the server's stream ends", || server.state.streams.load(SeqCst) == 0);
        }
        let mut stream = connection.stream(ENDLESS, b"", &plain()).unwrap();
        let kept = stream.next_frame().unwrap().unwrap();
        drop(stream);
        eventually("the server's stream ends", || server.state.streams.load(SeqCst) == 0);
        drop(kept);

        let mut stream = connection.stream(ENDLESS, b"", &plain()).unwrap();
        assert!(stream.next().unwrap().is_ok());
        stream.cancel().unwrap();
        stream.cancel().unwrap();
        let last = stream.by_ref().last().unwrap();
        assert!(matches!(last, Err(IpcError::Cancelled)), "{last:?}");
        assert!(stream.next().is_none());
        assert_eq!(connection.call(COUNT, b"").unwrap().len(), 8);
    }
}

/// Goal:   R1.9: a reader that stops stops its own stream; calls beside it go on; nothing of it is lost.
/// Method: an endless stream that is not read beside 200 calls; then a frame of it, in order.
#[test]
fn r1_9_a_reader_that_stops_stops_its_own_stream_alone() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connection = client.open().unwrap();
        let mut stream = connection.stream(ENDLESS, b"", &plain()).unwrap();
        let mut at = stream.next().unwrap().unwrap().len();
        for i in 0..200u32 {
            let request = i.to_le_bytes();
            assert_eq!(connection.call(MessageType::ECHO, &request).unwrap(), request);
        }
        for _ in 0..20 {
            let frame = stream.next().unwrap().unwrap();
            assert!(is_pattern(&frame, at));
            at += frame.len();
        }
    }
}

/// Goal:   a stream whose frame does not come in time is over, with an error that says so; errors of the handler are
///         its end.
#[test]
fn r2_9_a_stream_that_does_not_go_on_times_out() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    let options = CallOptions { timeout: Some(Duration::from_millis(20)), ..plain() };
    let mut stream = connection.stream(GATE, b"", &options).unwrap();
    assert!(matches!(stream.next(), Some(Err(IpcError::Timeout))));
    assert!(stream.next().is_none());
    server.open_gate();
    let mut stream = connection.stream(PANIC, b"", &plain()).unwrap();
    assert!(matches!(stream.next(), Some(Err(IpcError::HandlerPanic))));
    assert!(stream.next().is_none());
    assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
}
