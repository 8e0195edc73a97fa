//! Compiles the .proto files: `protox` parses them, so no `protoc` is needed on the machine.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;

use prost::Message;

const FILES: [&str; 4] =
    ["lockstep/v1/common.proto", "lockstep/v1/worker.proto", "lockstep/v1/monitor.proto", "lockstep/v1/control.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out_dir = env::var("OUT_DIR")?;
    // For gRPC reflection, and for the test that every field is documented: the comments are in it.
    fs::write(Path::new(&out_dir).join("lockstep.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".lockstep.v1").compile_fds(descriptors)?;
    Ok(())
}
