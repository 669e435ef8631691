//! What stands above the framework, on a mock of it.

use super::*;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use vm_accel_core::whole_vm::WholeVmBoot;

/// A framework that writes down what it is asked for and walks through the states as the real one says it does.
#[derive(Debug, Clone)]
struct Mock(Arc<Mutex<MockState>>);

#[derive(Debug)]
struct MockState {
    calls: Vec<String>,
    state: WholeVmState,
    /// The error of the next operation.
    fail: Option<AccelError>,
}

impl Mock {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(MockState { calls: Vec::new(), state: WholeVmState::Stopped, fail: None })))
    }

    fn call(&self, name: impl Into<String>, then: Option<WholeVmState>) -> VcpuResult<()> {
        let mut mock = self.0.lock().unwrap();
        mock.calls.push(name.into());
        if let Some(error) = mock.fail.take() {
            return Err(error);
        }
        mock.state = then.unwrap_or(mock.state);
        Ok(())
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }

    fn set(&self, state: WholeVmState) {
        self.0.lock().unwrap().state = state;
    }

    fn fail(&self, error: AccelError) {
        self.0.lock().unwrap().fail = Some(error);
    }
}

impl Platform for Mock {
    fn limits(&self) -> Limits {
        Limits { cpus: 1..=8, memory: 4 << 20..=16 << 30 }
    }

    fn create(&self, config: WholeVmConfig) -> VcpuResult<Box<dyn Machine>> {
        self.call(format!("create {} {:#x}", config.cpus, config.memory), None)?;
        Ok(Box::new(self.clone()))
    }
}

impl Machine for Mock {
    fn state(&self) -> WholeVmState {
        self.0.lock().unwrap().state
    }
    fn start(&self) -> VcpuResult<()> {
        self.call("start", Some(WholeVmState::Running))
    }
    fn stop(&self) -> VcpuResult<()> {
        self.call("stop", Some(WholeVmState::Stopped))
    }
    fn request_stop(&self) -> VcpuResult<()> {
        // The guest may take its time.
        self.call("request_stop", None)
    }
    fn pause(&self) -> VcpuResult<()> {
        self.call("pause", Some(WholeVmState::Paused))
    }
    fn resume(&self) -> VcpuResult<()> {
        self.call("resume", Some(WholeVmState::Running))
    }
    fn save(&self, to: &Path) -> VcpuResult<()> {
        self.call(format!("save {}", to.display()), None)
    }
    fn restore(&self, from: &Path) -> VcpuResult<()> {
        self.call(format!("restore {}", from.display()), Some(WholeVmState::Paused))
    }
    fn connect(&self, port: u32) -> VcpuResult<File> {
        self.call(format!("connect {port}"), None)?;
        File::open(std::env::current_exe().unwrap()).map_err(|error| AccelError::host("open", &error))
    }
}

fn linux(memory: u64) -> WholeVmConfig {
    let boot = WholeVmBoot::Linux { kernel: PathBuf::from("Image"), initrd: None, cmdline: "console=hvc0".to_owned() };
    WholeVmConfig::new(boot, memory)
}

/// A mock and a machine on it, as a user of the library sees it.
fn machine() -> (Mock, AccelVz) {
    let mock = Mock::new();
    (mock.clone(), AccelVz::on(Box::new(mock)))
}

fn is_refused(result: VcpuResult<()>, words: &str) {
    let error = result.expect_err("this must be refused");
    assert!(matches!(error, AccelError::InvalidArgument { .. }), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn a_machine_lives_from_start_to_stop() {
    let (mock, accel) = machine();
    let vm = accel.as_whole_vm().expect("VZ runs whole machines");
    assert_eq!(vm.state(), WholeVmState::Stopped);
    vm.configure(WholeVmConfig { cpus: 2, ..linux(256 << 20) }).unwrap();
    vm.start().unwrap();
    assert_eq!(vm.state(), WholeVmState::Running);
    vm.connect(1024).unwrap();
    vm.pause().unwrap();
    vm.save(Path::new("state")).unwrap();
    vm.resume().unwrap();
    vm.request_stop().unwrap();
    assert_eq!(vm.state(), WholeVmState::Running);
    vm.stop().unwrap();
    vm.restore(Path::new("state")).unwrap();
    assert_eq!(vm.state(), WholeVmState::Paused);
    vm.stop().unwrap();
    let calls = [
        "create 2 0x10000000",
        "start",
        "connect 1024",
        "pause",
        "save state",
        "resume",
        "request_stop",
        "stop",
        "restore state",
        "stop",
    ];
    assert_eq!(mock.calls(), calls);
}

#[test]
fn values_out_of_range_do_not_reach_the_framework() {
    let (mock, vm) = machine();
    for cpus in [0, 9, u32::MAX] {
        is_refused(vm.configure(WholeVmConfig { cpus, ..linux(256 << 20) }), "allows 1 to 8");
    }
    for memory in [0, 3 << 20, (256 << 20) + 4096, (16 << 30) + (1 << 20), u64::MAX] {
        is_refused(vm.configure(linux(memory)), "units of 1 MiB");
    }
    assert!(mock.calls().is_empty());
    vm.configure(linux(4 << 20)).unwrap();
}

#[test]
fn a_machine_is_described_once_and_first() {
    let (mock, vm) = machine();
    is_refused(vm.start(), "not configured");
    is_refused(vm.stop(), "not configured");
    mock.fail(AccelError::Host { op: "validate", message: "no".to_owned(), code: Some(2) });
    assert!(matches!(vm.configure(linux(64 << 20)), Err(AccelError::Host { code: Some(2), .. })));
    // What failed left nothing behind.
    vm.configure(linux(64 << 20)).unwrap();
    is_refused(vm.configure(linux(64 << 20)), "already");
}

#[test]
fn calls_in_the_wrong_state_do_not_reach_the_framework() {
    use WholeVmState::{Changing, Failed, Paused, Running, Stopped, Unknown};
    type Call = fn(&AccelVz) -> VcpuResult<()>;
    let table: [(&str, Call, &[WholeVmState]); 8] = [
        ("start", |vm| vm.start(), &[Stopped]),
        ("stop", |vm| vm.stop(), &[Running, Paused]),
        ("request_stop", |vm| vm.request_stop(), &[Running]),
        ("pause", |vm| vm.pause(), &[Running]),
        ("resume", |vm| vm.resume(), &[Paused]),
        ("save x", |vm| vm.save(Path::new("x")), &[Paused]),
        ("restore x", |vm| vm.restore(Path::new("x")), &[Stopped]),
        ("connect 1", |vm| vm.connect(1).map(drop), &[Running]),
    ];
    let (mock, vm) = machine();
    vm.configure(linux(64 << 20)).unwrap();
    drop(mock.calls());
    for (name, call, allowed) in table {
        for state in [Stopped, Running, Paused, Failed, Changing, Unknown] {
            mock.set(state);
            if allowed.contains(&state) {
                call(&vm).unwrap();
                assert_eq!(mock.calls(), [name]);
            } else {
                is_refused(call(&vm), &state.to_string());
                assert!(mock.calls().is_empty(), "{name} in {state}");
            }
        }
    }
}

#[test]
fn the_frameworks_errors_come_through() {
    let (mock, vm) = machine();
    vm.configure(linux(64 << 20)).unwrap();
    let error = AccelError::Host { op: "start", message: "out of disk space".to_owned(), code: Some(8) };
    mock.fail(error.clone());
    assert_eq!(vm.start(), Err(error));
    assert_eq!(vm.state(), WholeVmState::Stopped);
}

#[test]
fn there_are_no_vcpus_and_the_error_says_what_to_use() {
    let (_, mut vm) = machine();
    let Err(error) = vm.create_vcpu(0) else { panic!("a vCPU on VZ") };
    assert!(matches!(error, AccelError::Unsupported { kind: Some(AccelKind::Vz), .. }), "{error:?}");
    assert!(error.to_string().contains("as_whole_vm"), "{error}");
    let region = GuestRegion::anonymous(vm_accel_core::memory::host_page_size()).unwrap();
    assert!(vm.map_memory(0, &region, MemoryFlags::RAM).is_err());
    assert_eq!((vm.capabilities().max_vcpus, vm.capabilities().max_whole_vm_cpus), (0, 8));
}
