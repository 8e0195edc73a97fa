//! Every service, call, message, field, enum and enum value of the .proto files has a comment; enums start with
//! `_UNSPECIFIED`; every call has a request and a response of its own; durations name their unit.

use std::collections::HashSet;

use protox::prost_reflect::DescriptorPool;
use protox::prost_reflect::prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};

/// The files and, for each, the paths that have a comment.
fn files() -> Vec<(FileDescriptorProto, HashSet<Vec<i32>>)> {
    let pool = DescriptorPool::decode(lockstep_proto::FILE_DESCRIPTOR_SET).unwrap();
    let files: Vec<FileDescriptorProto> = pool.file_descriptor_protos().cloned().collect();
    assert_eq!(files.len(), 4);
    assert!(files.iter().all(|file| file.package() == "lockstep.v1"));
    let commented = |file: &FileDescriptorProto| {
        let info = file.source_code_info.as_ref().expect("comments are part of the descriptor set");
        let told = |text: &str| text.trim().len() >= 3;
        info.location.iter().filter(|l| told(l.leading_comments())).map(|l| l.path.clone()).collect()
    };
    files.into_iter().map(|file| (file.clone(), commented(&file))).collect()
}

struct Check<'a> {
    commented: &'a HashSet<Vec<i32>>,
    bare: Vec<String>,
}

impl Check<'_> {
    fn see(&mut self, path: &[i32], name: &str) {
        if !self.commented.contains(path) {
            self.bare.push(name.to_owned());
        }
    }

    /// The numbers are those of google/protobuf/descriptor.proto: 2 field, 3 nested message, 4 nested enum, 8 oneof.
    fn message(&mut self, path: &[i32], message: &DescriptorProto) {
        self.see(path, message.name());
        for (i, field) in message.field.iter().enumerate() {
            self.see(&[path, &[2, i as i32]].concat(), &format!("{}.{}", message.name(), field.name()));
        }
        let mut oneofs: HashSet<i32> =
            message.field.iter().filter(|f| !f.proto3_optional()).filter_map(|f| f.oneof_index).collect();
        for i in oneofs.drain() {
            let name = message.oneof_decl[i as usize].name();
            self.see(&[path, &[8, i]].concat(), &format!("{}.{name}", message.name()));
        }
        for (i, nested) in message.nested_type.iter().enumerate() {
            self.message(&[path, &[3, i as i32]].concat(), nested);
        }
        for (i, nested) in message.enum_type.iter().enumerate() {
            self.enumeration(&[path, &[4, i as i32]].concat(), nested);
        }
    }

    fn enumeration(&mut self, path: &[i32], enumeration: &EnumDescriptorProto) {
        self.see(path, enumeration.name());
        for (i, value) in enumeration.value.iter().enumerate() {
            self.see(&[path, &[2, i as i32]].concat(), value.name());
        }
        let first = &enumeration.value[0];
        assert!(first.number() == 0 && first.name().ends_with("_UNSPECIFIED"), "{}", first.name());
    }
}

#[test]
fn everything_has_a_comment() {
    for (file, commented) in files() {
        let mut check = Check { commented: &commented, bare: Vec::new() };
        for (i, message) in file.message_type.iter().enumerate() {
            check.message(&[4, i as i32], message);
        }
        for (i, enumeration) in file.enum_type.iter().enumerate() {
            check.enumeration(&[5, i as i32], enumeration);
        }
        for (i, service) in file.service.iter().enumerate() {
            check.see(&[6, i as i32], service.name());
            for (j, method) in service.method.iter().enumerate() {
                check.see(&[6, i as i32, 2, j as i32], method.name());
            }
        }
        assert!(check.bare.is_empty(), "{}: no comment at {}", file.name(), check.bare.join(", "));
    }
}

#[test]
fn every_call_has_its_own_request_and_response() {
    let mut seen = HashSet::new();
    for (file, _) in files() {
        for method in file.service.iter().flat_map(|service| &service.method) {
            for (kind, suffix) in [(method.input_type(), "Request"), (method.output_type(), "Response")] {
                assert_eq!(kind, format!(".lockstep.v1.{}{suffix}", method.name()));
                assert!(seen.insert(kind.to_owned()), "{kind} is used twice");
            }
        }
    }
    assert_eq!(seen.len(), 16);
}

#[test]
fn comments_of_measures_name_their_unit() {
    for (file, _) in files() {
        let info = file.source_code_info.as_ref().unwrap();
        for (i, message) in file.message_type.iter().enumerate() {
            for (j, field) in message.field.iter().enumerate() {
                let path = [4, i as i32, 2, j as i32];
                let comment = info.location.iter().find(|l| l.path == path).unwrap().leading_comments();
                let name = field.name();
                let unit = match () {
                    () if name.ends_with("_micros") => "microseconds",
                    () if name.ends_with("_ms") => "illiseconds",
                    () if name.ends_with("_bytes") => "ytes",
                    () => "",
                };
                assert!(comment.contains(unit), "{}.{name}: the comment names no unit", message.name());
                let suspicious = ["duration", "interval", "timeout", "elapsed"].iter().any(|word| name.contains(word));
                assert!(!suspicious || name.ends_with("_micros"), "{}.{name}: no unit in the name", message.name());
            }
        }
    }
}
