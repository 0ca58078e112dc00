//! How much memory the requests that are under way may take: a client can send long ones to a model that never answers.

use super::ProviderError;
use crate::messages::{AIRequest, Message, Tool, ToolCall};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bytes for requests, and how many are in use.
#[derive(Debug)]
pub(super) struct Room {
    limit: usize,
    used: AtomicUsize,
}

/// The share of one request; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    room: Arc<Room>,
    bytes: usize,
}

impl Room {
    pub fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    /// The share of a request. One request always has room, however long.
    pub fn take(room: &Arc<Self>, request: &AIRequest) -> Result<Share, ProviderError> {
        let bytes = len(request);
        let mut used = room.used.load(Relaxed);
        loop {
            let after = used.saturating_add(bytes);
            if used > 0 && after > room.limit {
                return Err(ProviderError::NoMemory { used, limit: room.limit, wanted: bytes });
            }
            // Relaxed: a sum, by which no memory is published.
            match room.used.compare_exchange_weak(used, after, Relaxed, Relaxed) {
                Ok(_) => return Ok(Share { room: Arc::clone(room), bytes }),
                Err(other) => used = other,
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.used.fetch_sub(self.bytes, Relaxed);
    }
}

/// Bytes that a request takes: its texts, and the records that hold them.
fn len(request: &AIRequest) -> usize {
    let of_call = |call: &ToolCall| {
        let parameters = call.parameters.as_ref().map_or(0, |raw| raw.get().len());
        size_of::<ToolCall>() + call.name.len() + call.id.len() + parameters
    };
    let of_message = |message: &Message| {
        let calls = message.tool_calls.iter().flatten().map(of_call).sum::<usize>();
        size_of::<Message>() + message.content.len() + calls
    };
    let of_tool = |tool: &Tool| {
        let parameters = tool.parameters.as_ref().map_or(0, |raw| raw.get().len());
        size_of::<Tool>() + tool.name.len() + tool.description.as_ref().map_or(0, String::len) + parameters
    };
    size_of::<AIRequest>()
        + request.model.len()
        + request.system_prompt.as_ref().map_or(0, String::len)
        + request.messages.iter().map(of_message).sum::<usize>()
        + request.tools.iter().flatten().map(of_tool).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   S12: requests take what they take and give it back; there is an end to it, but one always has room.
    #[test]
    fn s12_requests_take_room_and_give_it_back() {
        let room = Arc::new(Room::new(10_000));
        let request = |len| AIRequest { model: "m".repeat(len), ..AIRequest::default() };
        let first = Room::take(&room, &request(50_000)).expect("one always has room");
        assert!(matches!(
            Room::take(&room, &request(1)),
            Err(ProviderError::NoMemory { limit: 10_000, used: 50_000.., .. })
        ));
        drop(first);
        let shares: Vec<_> = (0..2).map(|_| Room::take(&room, &request(4000)).unwrap()).collect();
        assert!(Room::take(&room, &request(4000)).is_err());
        drop(shares);
        assert_eq!(room.used.load(Relaxed), 0);
    }
}
