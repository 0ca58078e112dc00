//! A pipe on the heap, step by step.
#![cfg(not(loom))]

use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::pipe::{Pipe, PipeReader, PipeWriter, Range};

/// Goal:   R1.9: a writer that waits is woken as soon as there is the room that it waits for: not before, not later, once.
/// Method: a full pipe of four bytes, whose writer waits for two, emptied byte by byte.
#[test]
fn r1_9_a_writer_is_woken_as_soon_as_there_is_room() {
    let map = Mapping::on_heap(PAGE);
    let store = SharedBytes::new(&map, 0, PAGE).unwrap();
    let range = Range { offset: 0, len: 4 };
    let pipe = Pipe::new(range);
    let (mut writer, mut reader) = (PipeWriter::new(range), PipeReader::default());
    assert_eq!(writer.write(&pipe, &store, &[b"abcde"]), 4);
    assert!(writer.wait(&pipe, 2, false));
    let mut due = Vec::new();
    for expected in b"abcd" {
        let mut byte = [0];
        reader.take(&pipe, &store, &mut byte);
        reader.publish(&pipe);
        assert_eq!(byte[0], *expected);
        due.push(reader.wake_is_due(&pipe));
    }
    assert_eq!(due, [false, true, false, false]);
}
