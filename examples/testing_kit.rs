//! How a program tests what it does when its server is late, fails or goes away, without a server of its own making.
//!
//! ```sh
//! cargo run --example testing_kit
//! ```

use doorbell::testing::{Behaviour, TestServer};
use doorbell::{
    CallOptions, Context, HandlerError, HandlerTable, IpcError, MessageType, ReconnectingClient, Reply,
    Result,
};
use std::time::Duration;

/// What the program under test asks its server for.
const COMPLETE: MessageType = MessageType::USER;

fn complete(
    context: &Context<'_, Behaviour>,
    text: &[u8],
    reply: &mut Reply<'_>,
) -> std::result::Result<(), HandlerError> {
    context.state().pass()?;
    reply.write(text)?;
    reply.write(b";")
}

static TABLE: HandlerTable<Behaviour> = HandlerTable::with_builtins().on(COMPLETE, complete);

/// The program under test: completes a line, or leaves it as it is if that takes too long or fails.
fn completed(client: &ReconnectingClient, line: &str) -> Result<String> {
    let options = CallOptions { timeout: Some(Duration::from_millis(50)), ..CallOptions::default() };
    match client.open()?.call_with(COMPLETE, line.as_bytes(), &options) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(IpcError::Timeout | IpcError::NotExecuted | IpcError::Handler(_)) => Ok(line.to_owned()),
        Err(error) => Err(error),
    }
}

fn main() -> Result<()> {
    run()
}

/// The test.
pub fn run() -> Result<()> {
    let behaviour = Behaviour::default();
    let mut server = TestServer::start(&TABLE, behaviour.clone())?;
    let client = ReconnectingClient::connect(server.path())?;
    assert_eq!(completed(&client, "let a = 1")?, "let a = 1;");

    behaviour.fail(1);
    assert_eq!(completed(&client, "let b = 2")?, "let b = 2");

    behaviour.delay(Duration::from_millis(200));
    assert_eq!(completed(&client, "let c = 3")?, "let c = 3");
    behaviour.delay(Duration::ZERO);

    // It goes away and comes back; the program notices nothing.
    server.restart()?;
    assert_eq!(completed(&client, "let d = 4")?, "let d = 4;");
    println!("the program bears a server that fails, is late, and goes away");
    Ok(())
}
