//! A backend around another: what measures, delays or breaks a device says only where it differs.
//!
//! Invariant: what the outer one does not do itself goes to the inner one, unchanged.

use std::ops::Range;
use std::time::Instant;

use super::{
    Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, ModelKernels, Needs, Place, RowSource, Ticket, WeightSpec,
};
use crate::recording::Recording;
use crate::tensor::{BufferId, Weight, WeightFormat};
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

/// The methods of [`Backend`], each of which asks the inner one.
pub trait Around: Send {
    fn inner(&self) -> &dyn Backend;

    fn inner_mut(&mut self) -> &mut dyn Backend;

    fn info(&self) -> &DeviceInfo {
        self.inner().info()
    }

    fn prepare(&mut self, needs: &Needs) -> Result<(), DeviceError> {
        self.inner_mut().prepare(needs)
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        self.inner_mut().alloc(label, size_bytes)
    }

    fn place(&mut self, place: Place) {
        self.inner_mut().place(place);
    }

    fn are_ends_apart(&self) -> bool {
        self.inner().are_ends_apart()
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        self.inner_mut().alloc_host(label, size_bytes)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.inner_mut().write(buffer, offset_bytes, data)
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        self.inner_mut().load_weight(spec, source)
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        self.inner().weight_bytes(spec)
    }

    fn beside_weights_bytes(&self, cols: u32) -> u64 {
        self.inner().beside_weights_bytes(cols)
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        self.inner_mut().submit(recording)
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        self.inner_mut().wait(ticket, out)
    }

    fn settle(&mut self) -> LoadTimes {
        self.inner_mut().settle()
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        self.inner_mut().reopen()
    }

    fn matrix_size(&self) -> Option<u32> {
        self.inner().matrix_size()
    }

    fn mat_mul_kernels(&self, format: WeightFormat) -> Vec<MatMulKernel> {
        self.inner().mat_mul_kernels(format)
    }

    fn make_kernels(&mut self, of: &ModelKernels) -> Result<(), DeviceError> {
        self.inner_mut().make_kernels(of)
    }

    fn has_room(&self, shape: MatMulShape, kernel: &str, rows: u32) -> bool {
        self.inner().has_room(shape, kernel, rows)
    }

    fn attention_tolerance(&self) -> f32 {
        self.inner().attention_tolerance()
    }

    fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        self.inner().mat_mul_table(shape)
    }

    fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        self.inner_mut().set_mat_mul_table(shape, table)
    }

    fn now(&self) -> Instant {
        self.inner().now()
    }
}

impl<A: Around> Backend for A {
    fn info(&self) -> &DeviceInfo {
        Around::info(self)
    }

    fn prepare(&mut self, needs: &Needs) -> Result<(), DeviceError> {
        Around::prepare(self, needs)
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        Around::alloc(self, label, size_bytes)
    }

    fn place(&mut self, place: Place) {
        Around::place(self, place);
    }

    fn are_ends_apart(&self) -> bool {
        Around::are_ends_apart(self)
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        Around::alloc_host(self, label, size_bytes)
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        Around::write(self, buffer, offset_bytes, data)
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        Around::load_weight(self, spec, source)
    }

    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        Around::weight_bytes(self, spec)
    }

    fn beside_weights_bytes(&self, cols: u32) -> u64 {
        Around::beside_weights_bytes(self, cols)
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        Around::submit(self, recording)
    }

    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        Around::wait(self, ticket, out)
    }

    fn settle(&mut self) -> LoadTimes {
        Around::settle(self)
    }

    fn reopen(&mut self) -> Result<(), DeviceError> {
        Around::reopen(self)
    }

    fn matrix_size(&self) -> Option<u32> {
        Around::matrix_size(self)
    }

    fn mat_mul_kernels(&self, format: WeightFormat) -> Vec<MatMulKernel> {
        Around::mat_mul_kernels(self, format)
    }

    fn make_kernels(&mut self, of: &ModelKernels) -> Result<(), DeviceError> {
        Around::make_kernels(self, of)
    }

    fn has_room(&self, shape: MatMulShape, kernel: &str, rows: u32) -> bool {
        Around::has_room(self, shape, kernel, rows)
    }

    fn attention_tolerance(&self) -> f32 {
        Around::attention_tolerance(self)
    }

    fn mat_mul_table(&self, shape: MatMulShape) -> Vec<MatMulLine> {
        Around::mat_mul_table(self, shape)
    }

    fn set_mat_mul_table(&mut self, shape: MatMulShape, table: &[MatMulLine]) -> Result<(), String> {
        Around::set_mat_mul_table(self, shape, table)
    }

    fn now(&self) -> Instant {
        Around::now(self)
    }
}
