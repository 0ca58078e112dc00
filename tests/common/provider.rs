//! What tests of providers share: requests, a runtime, a sink in memory.

use doorbell::messages::{AIRequest, AIResponse, FinishReason, StreamChunk};
use doorbell::provider::{Call, ChunkSink, Gone, Kind, ProviderError};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Runs a future as a host would.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(30), future).await };
    runtime.block_on(limited).expect("nothing hangs")
}

/// A request with one message.
pub fn request(model: &str, content: &str) -> AIRequest {
    let messages =
        serde_json::json!({ "messages": [{ "role": "user", "content": content }], "model": model });
    serde_json::from_value(messages).unwrap()
}

pub fn call(model: &str, content: &str) -> Call {
    Call::new(Kind::Chat, request(model, content))
}

/// The next of a stream.
pub async fn next<S: futures_core::Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|cx| std::pin::Pin::new(&mut *stream).poll_next(cx)).await
}

/// All of a stream.
pub async fn all<S: futures_core::Stream + Unpin>(mut stream: S) -> Vec<S::Item> {
    let mut items = Vec::new();
    while let Some(item) = next(&mut stream).await {
        items.push(item);
    }
    items
}

/// The text of chunks, put together.
pub fn text_of<'a>(chunks: impl IntoIterator<Item = &'a StreamChunk>) -> String {
    let text = |chunk: &'a StreamChunk| match chunk {
        StreamChunk::Text { text } => text.as_str(),
        _ => "",
    };
    chunks.into_iter().map(text).collect()
}

/// Checks that chunks end with exactly one `End`, of this reason.
pub fn assert_ends(chunks: &[StreamChunk], reason: FinishReason) {
    let is_end = |chunk: &&StreamChunk| matches!(chunk, StreamChunk::End { .. });
    assert_eq!(chunks.iter().filter(is_end).count(), 1, "{chunks:?}");
    assert_eq!(chunks.last(), Some(&StreamChunk::End { finish_reason: reason }), "{chunks:?}");
}

/// How a sink ended.
#[derive(Debug)]
pub enum Ended {
    Finished,
    Answered(AIResponse),
    Failed(ProviderError),
    Dropped,
}

/// The reader's side of a [`Sink`].
pub struct Reader {
    shared: Arc<Mutex<Shared>>,
    ended: Receiver<Ended>,
}

/// A sink in memory that holds only so many chunks.
pub struct Sink {
    shared: Arc<Mutex<Shared>>,
    ended: Sender<Ended>,
    told: bool,
}

#[derive(Default)]
struct Shared {
    chunks: VecDeque<StreamChunk>,
    room: usize,
    cancelled: bool,
    waker: Option<Waker>,
}

/// A sink for `room` chunks that have not been read.
pub fn sink(room: usize) -> (Box<Sink>, Reader) {
    let shared = Arc::new(Mutex::new(Shared { room, ..Shared::default() }));
    let (sender, ended) = channel();
    (Box::new(Sink { shared: Arc::clone(&shared), ended: sender, told: false }), Reader { shared, ended })
}

impl Reader {
    pub fn cancel(&self) {
        let mut shared = self.shared.lock().unwrap();
        shared.cancelled = true;
        shared.waker.take().into_iter().for_each(Waker::wake);
    }

    /// What is there now.
    pub fn read(&self) -> Vec<StreamChunk> {
        let mut shared = self.shared.lock().unwrap();
        shared.waker.take().into_iter().for_each(Waker::wake);
        shared.chunks.drain(..).collect()
    }

    pub fn unread(&self) -> usize {
        self.shared.lock().unwrap().chunks.len()
    }

    /// Waits for the end without reading.
    pub fn ended(&self) -> Ended {
        self.ended.recv_timeout(Duration::from_secs(20)).expect("the call ends")
    }

    /// Reads to the end.
    pub fn read_all(&self) -> (Vec<StreamChunk>, Ended) {
        let mut chunks = Vec::new();
        for _ in 0..20_000 {
            chunks.extend(self.read());
            if let Ok(ended) = self.ended.recv_timeout(Duration::from_millis(1)) {
                chunks.extend(self.read());
                return (chunks, ended);
            }
        }
        panic!("the call does not end; it gave {chunks:?}")
    }
}

impl Sink {
    fn end(&mut self, ended: Ended) {
        self.told = true;
        self.ended.send(ended).ok();
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if !self.told {
            self.end(Ended::Dropped);
        }
    }
}

impl ChunkSink for Sink {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        let mut shared = self.shared.lock().unwrap();
        if shared.chunks.len() < shared.room {
            return Poll::Ready(Ok(()));
        }
        shared.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut shared = self.shared.lock().unwrap();
        shared.waker = Some(cx.waker().clone());
        if shared.cancelled { Poll::Ready(()) } else { Poll::Pending }
    }

    fn chunk(&mut self, chunk: &StreamChunk) -> Result<(), Gone> {
        let mut shared = self.shared.lock().unwrap();
        assert!(shared.chunks.len() < shared.room, "a chunk comes although there is no room");
        shared.chunks.push_back(chunk.clone());
        Ok(())
    }

    fn finish(mut self: Box<Self>) {
        self.end(Ended::Finished);
    }

    fn answer(mut self: Box<Self>, response: AIResponse) {
        self.end(Ended::Answered(response));
    }

    fn fail(mut self: Box<Self>, error: ProviderError) {
        self.end(Ended::Failed(error));
    }
}
